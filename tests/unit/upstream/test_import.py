"""``ardiff import-upstream`` end to end: files in, a pipeline out that samples what the authors' code samples."""

import contextlib
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import ardiff.sampling.full
from ardiff.cli import main
from ardiff.config import load_config
from ardiff.data.latents import LatentStatistics
from ardiff.data.transforms import to_unit
from ardiff.diffusion.config import DiffusionConfig
from ardiff.import_upstream import SCHEDULE
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.pretrained import load_autoencoder
from ardiff.upstream.checkpoints import load_vae
from ardiff.vae import DecoderCache
from ray_jobs.training.config import TrainVAEConfig

SMALL = ["--dit-heads", "4", "--vae-heads", "2", "--image-size", "64", "--num-frames", "4"]


Arguments = Callable[..., list[str]]


def import_arguments(folder: Path, weights: Any, numbers: Any, vae: str = "vae_img", **tables: Tensor) -> list[str]:
    """Writes small checkpoints and returns the command that imports them; classes 1 and 2 are the golden ones."""
    context = numbers("sampler")["context"]
    zero = torch.zeros_like(context[:1])
    tables = tables or {"class_emb": torch.cat([zero, context, zero])}
    torch.save({**weights("dit"), **tables}, folder / "d.bin")
    save_file(weights(vae), folder / "v.safetensors")
    paths = ["--dit", str(folder / "d.bin"), "--vae", str(folder / "v.safetensors")]
    return ["import-upstream", *paths, "--out", str(folder / "out"), *SMALL]


@pytest.fixture
def files(tmp_path: Path, weights, numbers) -> Arguments:
    """``files(vae, **tables)``: see :func:`import_arguments`."""
    return functools.partial(import_arguments, tmp_path, weights, numbers)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, weights, numbers) -> tuple[str, str]:
    """The folder of an imported pipeline with classes and a temporal AR-VAE, and what the command printed."""
    folder, printed = tmp_path_factory.mktemp("imported"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(import_arguments(folder, weights, numbers, "vae_wt")) == 0
    return str(folder / "out"), printed.getvalue()


@pytest.fixture
def pipeline(imported) -> ARDiffusionPipeline:
    return ARDiffusionPipeline.from_pretrained(imported[0])


def sample(pipeline: ARDiffusionPipeline, noise: Tensor, **params: Any) -> Tensor:
    """The latents that the pipeline generates from ``noise``."""
    params |= {"num_frames": noise.shape[1], "num_inference_steps": 10, "mode": "full", "seed": list(range(len(noise)))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ardiff.sampling.full, "initial_noise", lambda *_: noise)
        return torch.cat(list(pipeline.stream_latents(**params)), dim=1)


def test_the_command_prints_what_it_imports(imported) -> None:
    assert "4 frames, 3 classes, 5 condition tokens" in imported[1]
    assert "64 x 64 pixels, temporal attention in clips" in imported[1]
    assert "mode=full" in imported[1]


@pytest.mark.parametrize("frames", [4, 7])
@pytest.mark.parametrize(("ar_step", "scale"), [(5, 2.0), (10, 1.0)])
def test_the_pipeline_samples_the_latents_of_the_authors_code(pipeline, numbers, frames, ar_step, scale):
    golden = numbers("sampler")
    latents = sample(pipeline, golden[f"xT_{frames}"], class_label=[1, 2], ar_step=ar_step, guidance_scale=scale)
    assert float((latents - golden[f"zfrozen_F{frames}_s{ar_step}_g{scale}"]).abs().max()) < 2e-4


def test_the_pipeline_decodes_with_the_authors_vae(pipeline, weights, numbers):
    """Five frames: a clip of four and the beginning of another."""
    latents = numbers("sampler")["zfrozen_F7_s5_g2.0"][:1, :5]
    video = torch.stack(list(pipeline.decode(latents, DecoderCache())), dim=1)
    vae = load_vae(weights("vae_wt"), num_heads=2, image_size=64, num_frames=4)
    with torch.no_grad():
        pixels = (vae.decode(latents).clamp(-1, 1) + 1) * 127.5
    assert (video - pixels.permute(0, 1, 3, 4, 2)).abs().max() < 1.01


def test_a_model_without_classes_is_guided_away_from_zero_tokens(files, numbers, tmp_path, capsys):
    golden = numbers("sampler")
    assert main(files(context_emb=golden["context"][1])) == 0
    assert "no classes, 5 condition tokens" in capsys.readouterr().out
    pipeline = ARDiffusionPipeline.from_pretrained(str(tmp_path / "out"))
    latents = sample(pipeline, golden["xT_4"][1:], ar_step=2, guidance_scale=2.0)
    assert float((latents - golden["zfrozen_F4_s2_g2.0"][1:]).abs().max()) < 2e-4
    with pytest.raises(ValueError, match="the model has no classes"):
        pipeline(class_label=0, mode="full")


def test_a_checkpoint_of_the_authors_trainer(files, weights, numbers, tmp_path, capsys):
    """The network under its prefix, schedule buffers and an AR-VAE in the same file: the same pipeline."""
    assert main(files()) == 0
    expected = ARDiffusionPipeline.from_pretrained(str(tmp_path / "out"))
    tables = {"class_emb": expected.dit.condition.table.detach()}
    buffers = {name: torch.rand(1000) for name in SCHEDULE}
    buffers["alphas_cumprod"] = DiffusionConfig().alphas_cumprod().float()
    state = {
        **{f"module.diffusion_model.model.{name}": tensor for name, tensor in weights("dit").items()},
        **{f"module.diffusion_model.{name}": tensor for name, tensor in buffers.items()},
        **{f"module.{name}": tensor for name, tensor in tables.items()},
        **{f"module.vae.{name}": tensor for name, tensor in weights("vae_img").items()},
    }
    call = ["import-upstream", "--dit", str(tmp_path / "all.bin"), "--out", str(tmp_path / "other"), *SMALL]
    torch.save(state, tmp_path / "all.bin")
    assert main(call) == 0
    made = ARDiffusionPipeline.from_pretrained(str(tmp_path / "other"))
    for model, other in ((made.dit, expected.dit), (made.vae, expected.vae)):
        assert model.config == other.config
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert main([*call, "--vae", str(tmp_path / "v.safetensors")]) == 0
    assert "is not used" in capsys.readouterr().out
    torch.save({**state, "module.diffusion_model.alphas_cumprod": torch.rand(1000)}, tmp_path / "all.bin")
    assert main(call) == 1
    assert "another noise schedule" in capsys.readouterr().err
    torch.save({**state, "module.diffusion_model.surprise": torch.rand(1)}, tmp_path / "all.bin")
    assert main(call) == 1
    assert "diffusion_model.surprise is unknown" in capsys.readouterr().err


def test_cached_modes_are_refused_with_the_reason(pipeline, imported, tmp_path, capsys):
    for mode in ("window", "rolling"):
        with pytest.raises(ValueError, match=r"frames of this model do .*condition_attention=all.*mode=full"):
            pipeline(num_frames=4, num_inference_steps=4, mode=mode)
    call = ["generate", "--pipeline", imported[0], "--num-frames", "4", "--output", str(tmp_path / "videos")]
    assert main(call) == 2
    assert "sample it with mode=full" in capsys.readouterr().err
    assert not (tmp_path / "videos").exists()


def test_strict_causal(files, numbers, tmp_path, capsys):
    golden = numbers("sampler")
    assert main([*files(), "--strict-causal"]) == 0
    out = capsys.readouterr().out
    assert "Warning: with --strict-causal" in out
    assert "mode=full" not in out
    pipeline = ARDiffusionPipeline.from_pretrained(str(tmp_path / "out"))
    assert pipeline.dit.config.condition_attention == "self"
    latents = sample(pipeline, golden["xT_4"], class_label=[1, 2], ar_step=5, guidance_scale=2.0)
    assert float((latents - golden["zfrozen_F4_s5_g2.0"]).abs().max()) > 1e-2
    settings = {"num_frames": 7, "num_inference_steps": 4, "class_label": [1, 2], "guidance_scale": 2.0}
    cached, full = (torch.cat(list(pipeline.stream_latents(mode=m, **settings)), dim=1) for m in ("window", "full"))
    assert torch.allclose(cached, full, atol=1e-5)


def test_given_frames_become_latents_of_length_1(pipeline):
    assert pipeline.statistics == LatentStatistics([[0.0] * 4] * 8, 1.0)
    frames = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = pipeline.vae.latents(to_unit(frames[None]))
        expected = pipeline.vae.decode(latents)
    assert torch.allclose(latents.norm(dim=-1), torch.ones(1, 2, 8), atol=1e-5)
    video = pipeline(condition=frames, num_frames=3, num_inference_steps=4, ar_step=2, mode="full", seed=1).frames
    assert (video[:, :2] - (expected.clamp(-1, 1) + 1).permute(0, 1, 3, 4, 2) * 127.5).abs().max() < 1.01


def test_an_autoencoder_alone(files, weights, numbers, tmp_path, capsys):
    call = files("vae_wt")
    assert main([call[0], *call[3:]]) == 0
    assert "train_vae.yaml" in capsys.readouterr().out
    vae = load_autoencoder(str(tmp_path / "out"))
    golden = numbers("vae_wt")
    with torch.no_grad():
        latents = vae.encode(2 * golden["x"] - 1).mean
        assert float((latents - golden["z"][:, :, :, 0].transpose(2, 3)).abs().max()) < 1e-4
    config = load_config(TrainVAEConfig, [tmp_path / "out" / "train_vae.yaml"])
    assert config.vae == vae.config
    assert config.init_from == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give --dit FILE and --vae FILE"),
        (["--dit", "a.bin"], "Give --dit FILE and --vae FILE"),
        (["--dit", "a.bin", "--vae-from-titok", "b.bin", "--out", "c"], "leave --dit and --vae out"),
        (["--vae", "a.bin", "--out", "c", "--strict-causal"], "give --dit too"),
        (["--vae", "a.bin", "--out", "c", "--vae-heads", "0"], "must be at least 1"),
    ],
)
def test_wrong_calls(capsys, arguments, message):
    assert main(["import-upstream", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_files_that_cannot_be_imported_leave_nothing(files, weights, tmp_path, capsys):
    call = files()
    (tmp_path / "d.bin").write_bytes((tmp_path / "d.bin").read_bytes()[:1000])
    assert main(call) == 1
    assert "d.bin" in capsys.readouterr().err
    torch.save(weights("dit"), tmp_path / "d.bin")
    assert main(call) == 1
    assert "has no condition tokens: context_emb or class_emb is missing" in capsys.readouterr().err
    assert main([*call[:3], *call[5:]]) == 2
    assert "holds no AR-VAE" in capsys.readouterr().err
    call = files()
    assert main([*call, "--vae", str(tmp_path / "d.bin")]) == 1
    assert "decoder.decoder_embed.weight is missing" in capsys.readouterr().err
    assert main([*call, "--num-frames", "5"]) == 1
    assert "32 positions (pos_embed) do not divide into 5 frames" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
