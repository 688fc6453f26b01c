"""The authors' models: numbers equal to those of their code, full sizes, and weights that do not fit."""

import pytest
import torch
from torch import Tensor

from ardiff.diffusion import ad, solvers
from ardiff.diffusion.ad import ad_schedule
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.guidance import guide
from ardiff.diffusion.prediction import Denoiser
from ardiff.diffusion.sampler import sample_full
from ardiff.dit import DiT
from ardiff.errors import CheckpointError
from ardiff.upstream.autoencoder import UpstreamAutoencoder
from ardiff.upstream.checkpoints import dit_config, load_dit, load_vae, vae_config, vae_from_titok
from ardiff.upstream.dit import UpstreamDiT
from ardiff.upstream.keys import DIT_RULES, VAE_RULES, translate

MODES = {
    "self": "y_share_norm_temporal_causal",
    "all": "y_share_norm_video_temporal_causal",
    "full": "y_share_norm_None",
}


def encode(model: UpstreamAutoencoder, frames: Tensor) -> Tensor:
    """The posterior's means of frames in [0, 1], as the authors' code encodes."""
    return model.encode(2 * frames - 1).mean


def decode(model: UpstreamAutoencoder, latents: Tensor) -> Tensor:
    """Frames about in [0, 1], as the authors' code decodes."""
    return (model.decode(latents) + 1) / 2


def small_dit(weights, mode: str = "all") -> DiT:
    return load_dit(weights("dit"), num_heads=4, num_frames=4, condition_attention=mode)


def error(output: Tensor, expected: Tensor) -> float:
    assert output.shape == expected.shape
    return float((output - expected).abs().max())


@pytest.mark.parametrize(("mode", "name"), MODES.items())
def test_dit(weights, numbers, mode, name):
    golden, model = numbers("dit"), small_dit(weights, mode)
    with torch.no_grad():
        assert error(model(golden["x"], golden["t"], golden["context"]), golden[name]) < 1e-4


@pytest.mark.parametrize("kind", ["vae_img", "vae_wt"])
def test_vae(weights, numbers, kind):
    golden, model = numbers(kind), load_vae(weights(kind), num_heads=2, image_size=64)
    latents = golden["z"][:, :, :, 0].transpose(2, 3)  # the authors' are (B, F, D, 1, L)
    with torch.no_grad():
        assert error(encode(model, golden["x"]), latents) < 1e-4
        assert error(decode(model, latents), golden["recon"]) < 1e-4


def guided(model: DiT, context: Tensor, scale: float) -> Denoiser:
    """Guidance away from condition tokens that are zero."""

    def denoise(x: Tensor, timesteps: Tensor, frames: Tensor) -> Tensor:
        conditional = model(x, timesteps, context)
        if scale == 1.0:
            return conditional
        return guide(conditional, model(x, timesteps, torch.zeros_like(context)), scale)

    return denoise


def rounded_coefficients(timesteps: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """DDIM coefficients of the authors' code, which rounds ``alphas_cumprod`` of the next timestep to float32 first."""
    abar, rounded = alphas_cumprod[timesteps], alphas_cumprod.float().double()
    following = torch.cat([rounded[timesteps[1:]], rounded[:1]])
    x_factor = ((1.0 - following) / (1.0 - abar)).sqrt()
    return x_factor, following.sqrt() - x_factor * abar.sqrt()


@pytest.mark.parametrize(("frames", "ar_step"), [(4, 0), (4, 2), (4, 5), (4, 10), (7, 5), (7, 10)])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_sampling(weights, numbers, monkeypatch, frames, scale, ar_step):
    golden, model, name = numbers("sampler"), small_dit(weights), f"F{frames}_s{ar_step}_g{scale}"
    denoise, schedule = guided(model, golden["context"], scale), ad_schedule(frames, 10, ar_step, window=4)
    latents = sample_full(denoise, golden[f"xT_{frames}"], schedule, DiffusionConfig())
    assert error(latents, golden[f"zfrozen_{name}"]) < 2e-4
    assert error(latents, golden[f"z_{name}"]) < 2e-3
    monkeypatch.setattr(solvers, "ddim_coefficients", rounded_coefficients)
    latents = sample_full(denoise, golden[f"xT_{frames}"], schedule, DiffusionConfig())
    assert error(latents, golden[f"zfrozen_{name}"]) < 2e-5


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_frames_that_the_authors_code_leaves_at_noise(weights, numbers, monkeypatch, scale):
    """7 frames at ``ar_step`` 2 leave the window of 4 before their tenth step: refused, else the same numbers."""
    with pytest.raises(ValueError, match=r"window of 4 frames.*smallest valid ar_step is 3"):
        ad_schedule(7, 10, 2, window=4)
    monkeypatch.setattr(ad, "check_ar_step", lambda *settings: None)
    golden, schedule = numbers("sampler"), ad_schedule(7, 10, 2, window=4)
    denoise = guided(small_dit(weights), golden["context"], scale)
    latents = sample_full(denoise, golden["xT_7"], schedule, DiffusionConfig())
    assert error(latents, golden[f"zfrozen_F7_s2_g{scale}"]) < 2e-4
    assert error(latents, golden[f"z_F7_s2_g{scale}"]) < 2e-3


@pytest.mark.parametrize("kind", ["dit", "vae_img", "vae_wt"])
def test_full_size(full_keys, kind):
    """Every tensor of the authors is a parameter of our model, and the other way round."""
    shapes, count = full_keys(kind)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        if kind == "dit":
            model: torch.nn.Module = UpstreamDiT(dit_config(state, 16, 16, "all", kind))
        else:
            model = UpstreamAutoencoder(vae_config(state, 16, 256, 16, "clip" if kind == "vae_wt" else "none", kind))
    translated = translate(state, DIT_RULES if kind == "dit" else VAE_RULES, model, kind)
    assert len(translated) == len(state)
    assert {name: p.shape for name, p in model.named_parameters()} == {n: t.shape for n, t in translated.items()}
    assert sum(p.numel() for p in model.parameters()) == count
    assert count == {"dit": 672_454_660, "vae_img": 640_993_547, "vae_wt": 842_713_355}[kind]


def test_sizes_of_the_authors_models(full_keys) -> None:
    dit = dit_config({n: torch.empty(s, device="meta") for n, s in full_keys("dit")[0].items()}, 16, 16, "all", "")
    assert (dit.width, dit.depth, dit.num_tokens, dit.token_dim, dit.condition_dim) == (1152, 28, 32, 4, 768)
    state = {n: torch.empty(s, device="meta") for n, s in full_keys("vae_wt")[0].items()}
    vae = vae_config(state, 16, 256, 16, "clip", "")
    assert (vae.width, vae.depth, vae.num_tokens, vae.token_dim, vae.patch_size) == (1024, 24, 32, 4, 16)


def test_condition_tokens_of_its_own(weights, numbers):
    """Class labels look up the condition tokens; the null class is zero tokens, or class 0."""
    golden = numbers("dit")
    context, settings = golden["context"], {"num_heads": 4, "num_frames": 4, "condition_attention": "all"}
    bare = load_dit(weights("dit"), **settings)
    labelled = load_dit({**weights("dit"), "class_emb": torch.cat([context, context[:1]])}, **settings)
    unlabelled = load_dit({**weights("dit"), "context_emb": context[0]}, **settings)
    assert (labelled.config.num_classes, labelled.null_class, labelled.unlabelled) == (2, 0, 0)
    assert (unlabelled.config.num_classes, unlabelled.null_class, unlabelled.unlabelled) == (0, 1, 0)

    def give(model: DiT, condition: Tensor) -> Tensor:
        with torch.no_grad():
            return model(golden["x"], golden["t"], condition)

    expected = give(bare, context)
    assert torch.equal(give(labelled, torch.tensor([0, 1])), expected)
    assert torch.equal(give(unlabelled, torch.tensor([0, 0])), give(bare, context[[0, 0]]))
    assert torch.equal(give(unlabelled, torch.tensor([0, 1]))[1:], give(bare, torch.zeros_like(context))[1:])
    with pytest.raises(ValueError, match="no condition tokens of its own"):
        give(bare, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"must be \(B, M, 16\)"):
        give(bare, context[..., 1:])


def test_which_models_read_later_frames(weights, numbers):
    """Perturbs the last frame. Earlier outputs are bitwise equal only if condition tokens see only one another."""
    golden = numbers("dit")
    other = golden["x"].clone()
    other[:, -1] += 1.0
    for mode, moved in (("self", False), ("all", True), ("full", True)):
        model = small_dit(weights, mode)
        with torch.no_grad():
            outputs = [model(x, golden["t"], golden["context"])[:, :-1] for x in (golden["x"], other)]
        assert torch.equal(*outputs) != moved


WRONG = {
    "a missing tensor": (lambda s: s.pop("blocks.1.attn.proj.bias"), r"blocks\.1\.attn\.proj\.bias missing"),
    "an unknown tensor": (lambda s: s.update(extra=torch.zeros(1)), "extra unknown"),
    "a missing layer": (lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.1.")], "in sequence"),
    "a wrong size": (
        lambda s: s.update({"blocks.2.mlp.fc2.bias": torch.zeros(63)}),
        r"blocks\.2\.mlp\.fc2\.bias is \(63,\), but the other tensors need \(64,\)",
    ),
    "too few axes": (lambda s: s.update({"x_embedder.weight": torch.zeros(64)}), "2 axes are expected"),
    "too few positions": (lambda s: s.update({"pos_embed": torch.zeros(1, 30, 64)}), "do not divide into 4 frames"),
    "integers": (lambda s: s.update({"c_embedder.bias": torch.zeros(64, dtype=torch.int64)}), "not floating-point"),
    "two tables": (
        lambda s: s.update(class_emb=torch.zeros(2, 8, 32), context_emb=torch.zeros(2, 8, 32)),
        "has both",
    ),
    "nothing": (lambda s: s.clear(), "pos_embed is missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_weights_that_do_not_fit(weights, case):
    state, (damage, message) = weights("dit"), WRONG[case]
    damage(state)
    with pytest.raises(CheckpointError, match=message):
        load_dit(state, num_heads=4, num_frames=4, condition_attention="all")


def test_settings_that_do_not_fit(weights):
    with pytest.raises(CheckpointError, match="multiple of num_heads 5"):
        load_dit(weights("dit"), num_heads=5, num_frames=4, condition_attention="all")
    with pytest.raises(CheckpointError, match="is for frames of 64 x 64 pixels, not 128"):
        load_vae(weights("vae_img"), num_heads=2, image_size=128)
    with pytest.raises(CheckpointError, match="multiple of num_heads 3"):
        load_vae(weights("vae_img"), num_heads=3, image_size=64)
    state = weights("vae_img")
    state["pixel_quantize_conv.weight"] = torch.zeros(256, 1024)
    with pytest.raises(CheckpointError, match=r"pixel_quantize_conv\.weight is \(256, 1024\)"):
        load_vae(state, num_heads=2, image_size=64)


def test_an_autoencoder_from_titok(weights, numbers):
    """Its means are TiTok's first channels, and its temporal attention adds nothing yet."""
    plain = weights("vae_img")
    titok = {k: t for k, t in plain.items() if not k.startswith("pixel_quantize_conv")}
    titok["pixel_quantize.embedding.weight"] = plain["pixel_quantize_conv.weight"][:, :, 0, 0].T
    titok["quantize.embedding.weight"] = torch.zeros(4096, 12)
    for key, axis in (
        ("encoder.conv_out.weight", 0),
        ("encoder.conv_out.bias", 0),
        ("decoder.decoder_embed.weight", 1),
    ):
        first = plain[key].narrow(axis, 0, 4)
        titok[key] = torch.cat([first, 9 * first, -3 * first], dim=axis)  # 12 channels
    plain["pixel_quantize_conv.bias"] = torch.zeros(256)
    settings = {"num_heads": 2, "image_size": 64}
    made = vae_from_titok(titok, token_dim=4, num_frames=3, source="TiTok", **settings)
    assert made.config.temporal == "clip"
    frames = torch.cat([numbers("vae_img")["x"]] * 2, dim=1) * torch.tensor([1.0, 0.5])[:, None, None, None]
    with torch.no_grad():
        expected = load_vae(plain, **settings)
        posterior = made.encode(2 * frames - 1)
        assert error(posterior.mean, encode(expected, frames)) < 1e-4
        assert torch.equal(posterior.log_variance, torch.full_like(posterior.mean, -6.0))
        assert error(decode(made, posterior.mean), decode(expected, posterior.mean)) < 1e-4
    with pytest.raises(CheckpointError, match=r"pixel_quantize\.embedding\.weight is missing"):
        vae_from_titok(plain, token_dim=4, num_frames=3, source="TiTok", **settings)
    with pytest.raises(CheckpointError, match="12 channels, fewer than 16"):
        vae_from_titok(titok, token_dim=16, num_frames=3, source="TiTok", **settings)
    for key, tensor, message in (
        ("pixel_quantize.embedding.weight", torch.zeros(8), "2 axes are expected"),
        ("encoder.conv_out.weight", titok["encoder.conv_out.weight"].expand(-1, -1, 3, 3), r"a kernel of \(3, 3\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            vae_from_titok({**titok, key: tensor}, token_dim=4, num_frames=3, source="TiTok", **settings)
