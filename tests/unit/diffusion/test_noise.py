"""Noise schedule and DDIM coefficients against stored numbers, conversions against each other."""

import pytest
import torch

from ardiff.diffusion import noise
from ardiff.diffusion.ad import inference_timesteps

ABAR = noise.alphas_cumprod(noise.betas())


def latents(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(3, 5, 2, 4, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def timesteps(num_timesteps: int = 1000) -> torch.Tensor:
    """Another timestep for every frame, the ends included."""
    drawn = torch.randint(num_timesteps, (3, 5), generator=torch.Generator().manual_seed(0))
    drawn[0, 0], drawn[2, 4] = 0, num_timesteps - 1
    return drawn


def test_betas_are_linear_in_the_root_and_end_at_the_right_place() -> None:
    betas = noise.betas()
    assert betas.shape == (1000,)
    assert betas.dtype == torch.float64
    assert float(betas[0]) == pytest.approx(1e-4, rel=1e-12)
    assert float(betas[-1]) == pytest.approx(0.02, rel=1e-12)  # Table 6 prints 0.002
    roots = betas.sqrt().diff()
    assert torch.allclose(roots, roots[:1].expand_as(roots), rtol=1e-9)
    assert noise.betas(1).tolist() == pytest.approx([1e-4])


@pytest.mark.parametrize("arguments", [(0,), (10, 0.0, 0.1), (10, 0.2, 0.1), (10, 0.1, 1.0), (10, -0.1, 0.5)])
def test_impossible_betas(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="betas need"):
        noise.betas(*arguments)  # type: ignore[arg-type]


def test_cumulative_products_equal_the_stored_ones(golden_schedule):
    first, second, last = golden_schedule("ddim_coeffs")["alphas_cumprod_first_last"]
    assert [float(ABAR[i]) for i in (0, 1, -1)] == pytest.approx([first, second, last], rel=1e-12)
    assert (ABAR.diff() < 0).all()
    assert ABAR.dtype == torch.float64


def test_ddim_coefficients_equal_the_stored_ones(golden_schedule):
    for case in golden_schedule("ddim_coeffs")["cases"]:
        x_factor, x0_factor = noise.ddim_coefficients(inference_timesteps(1000, case["S"]), ABAR)
        assert (x_factor.dtype, x0_factor.dtype) == (torch.float64, torch.float64)
        assert (x_factor - torch.tensor(case["cx"], dtype=torch.float64)).abs().max() < 1e-12
        assert (x0_factor - torch.tensor(case["cp"], dtype=torch.float64)).abs().max() < 1e-12


def test_the_last_step_is_clean_when_the_template_ends_at_zero() -> None:
    x_factor, x0_factor = noise.ddim_coefficients(inference_timesteps(1000, 1000), ABAR)
    assert (float(x_factor[-1]), float(x0_factor[-1])) == (0.0, 1.0)


def test_q_sample_uses_the_roots_of_both_variances() -> None:
    """Eq. 3 prints the noise's factor without its root."""
    x0, eps, t = latents(0), latents(1), timesteps()
    x_t = noise.q_sample(x0, eps, t, ABAR)
    for b, f in [(0, 0), (1, 3), (2, 4)]:
        abar = ABAR[t[b, f]]
        assert torch.allclose(x_t[b, f], abar.sqrt() * x0[b, f] + (1 - abar).sqrt() * eps[b, f], rtol=1e-14, atol=0)


def test_each_frame_has_a_timestep_of_its_own() -> None:
    x0, eps, t = latents(0), latents(1), timesteps()
    changed = t.clone()
    changed[1, 2] = (t[1, 2] + 500) % 1000
    same = (noise.q_sample(x0, eps, t, ABAR) == noise.q_sample(x0, eps, changed, ABAR)).flatten(2).all(dim=2)
    assert (~same).nonzero().tolist() == [[1, 2]]


def test_round_trips() -> None:
    x0, eps, t = latents(0), latents(1), timesteps()
    x_t = noise.q_sample(x0, eps, t, ABAR)
    v = ABAR.sqrt()[t][..., None, None] * eps - (1 - ABAR).sqrt()[t][..., None, None] * x0
    close = {"rtol": 1e-9, "atol": 1e-9}
    assert torch.allclose(noise.eps_from_x0(x_t, x0, t, ABAR), eps, **close)
    assert torch.allclose(noise.x0_from_eps(x_t, eps, t, ABAR), x0, **close)
    assert torch.allclose(noise.v_from_x0(x_t, x0, t, ABAR), v, **close)
    assert torch.allclose(noise.x0_from_v(x_t, v, t, ABAR), x0, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_and_shape_are_kept(dtype: torch.dtype) -> None:
    x0, eps, t = latents(0, dtype), latents(1, dtype), timesteps()
    x_factor, x0_factor = noise.ddim_coefficients(inference_timesteps(1000, 10), ABAR)
    for result in (
        noise.q_sample(x0, eps, t, ABAR),
        noise.eps_from_x0(eps, x0, t, ABAR),
        noise.v_from_x0(eps, x0, t, ABAR),
        noise.ddim_step(eps, x0, t % 10, x_factor, x0_factor),
    ):
        assert (result.dtype, result.shape) == (dtype, x0.shape)


@pytest.mark.parametrize("steps", [1, 5, 30, 50, 1000])
def test_ddim_with_perfect_predictions_follows_q_sample(steps: int) -> None:
    """Frames at different sampling steps; the noise of a frame never changes."""
    template = inference_timesteps(1000, steps)
    after = torch.cat([template[1:], torch.tensor([0])])
    factors = noise.ddim_coefficients(template, ABAR)
    x0, eps = latents(0), latents(1)
    step = torch.arange(15).reshape(3, 5) * 7 % steps
    result = noise.ddim_step(noise.q_sample(x0, eps, template[step], ABAR), x0, step, *factors)
    expected = noise.q_sample(x0, eps, after[step], ABAR)
    if steps == 1000:  # this template ends at timestep 0, and its last step leads to the clean latents
        expected = torch.where((step == 999)[..., None, None], x0, expected)
    assert torch.allclose(result, expected, rtol=1e-9, atol=1e-9)
