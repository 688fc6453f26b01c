import pytest
import torch

from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.guidance import guide, guided_denoiser
from ardiff.diffusion.loss import diffusion_loss
from ardiff.diffusion.noise import q_sample
from ardiff.diffusion.prediction import predicted_x0, prediction_target


def latents(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_the_target_stands_for_the_clean_latents(prediction: str) -> None:
    abar, x0, eps = DiffusionConfig().alphas_cumprod(), latents(0), latents(1)
    timesteps = torch.tensor([[0, 10, 500, 999], [3, 3, 700, 701]])
    x_t = q_sample(x0, eps, timesteps, abar)
    target = prediction_target(prediction, x0, eps, x_t, timesteps, abar)  # type: ignore[arg-type]
    result = predicted_x0(prediction, target, x_t, timesteps, abar)  # type: ignore[arg-type]
    assert torch.allclose(result, x0, rtol=1e-9, atol=1e-9)
    assert torch.equal(target, x0) == (prediction == "x0")


def test_unknown_prediction() -> None:
    arguments = (latents(0), latents(1), torch.zeros(2, 4, dtype=torch.int64), DiffusionConfig().alphas_cumprod())
    with pytest.raises(ValueError, match="unknown prediction 'score'"):
        predicted_x0("score", *arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown prediction 'score'"):
        prediction_target("score", latents(0), *arguments)  # type: ignore[arg-type]


def test_loss_is_the_mean_square_in_float32() -> None:
    output, target = latents(0).bfloat16(), latents(1).bfloat16()
    loss = diffusion_loss(output, target)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float((output.float() - target.float()).square().mean()))


def test_a_schedule_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="betas need"):
        DiffusionConfig(beta_end=2.0)


def test_guidance_is_linear_between_the_branches() -> None:
    conditional, unconditional = latents(0), latents(1)
    assert torch.allclose(guide(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)
    assert torch.allclose(guide(conditional, unconditional, 3.0), 3 * conditional - 2 * unconditional)


def test_guided_denoiser_evaluates_both_branches(make_dit):
    model, diffusion = make_dit().double(), DiffusionConfig()
    x, timesteps = latents(0), torch.tensor([[5, 50, 500, 999], [0, 1, 2, 3]])
    labels, null = torch.tensor([0, 2]), torch.tensor([model.null_class] * 2)
    conditional, unconditional = model(x, timesteps, labels), model(x, timesteps, null)
    assert torch.equal(guided_denoiser(model, diffusion, labels, 1.0)(x, timesteps), conditional)
    guided = guided_denoiser(model, diffusion, labels, 2.5)(x, timesteps)
    assert torch.allclose(guided, unconditional + 2.5 * (conditional - unconditional), rtol=1e-10, atol=1e-10)


def test_guidance_acts_on_clean_latents_whatever_the_model_predicts(make_dit):
    model, diffusion = make_dit().double(), DiffusionConfig(prediction="v")
    x, timesteps, labels = latents(0), torch.full((2, 4), 300), torch.tensor([0, 2])
    null, abar = torch.tensor([model.null_class] * 2), diffusion.alphas_cumprod()
    branches = [predicted_x0("v", model(x, timesteps, c), x, timesteps, abar) for c in (labels, null)]
    guided = guided_denoiser(model, diffusion, labels, 2.0)(x, timesteps)
    assert torch.allclose(guided, 2 * branches[0] - branches[1], rtol=1e-10, atol=1e-10)
