"""``ardiff import-upstream`` end to end: files in, a pipeline out that samples what the authors' code samples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import ardiff.pipeline
from ardiff.cli import main
from ardiff.config import load_config
from ardiff.data.latents import LatentStatistics
from ardiff.data.transforms import to_unit
from ardiff.diffusion.config import DiffusionConfig
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.pretrained import load_autoencoder
from ardiff.upstream import load_vae
from ardiff.upstream.command import SCHEDULE
from ray_jobs.train_vae import TrainVAEConfig

SMALL = ["--dit-heads", "4", "--vae-heads", "2", "--image-size", "64", "--num-frames", "4"]


@pytest.fixture
def files(tmp_path: Path, weights, numbers) -> Callable[..., list[str]]:
    """``files(**tables)``: arguments that import small checkpoints; by default classes 1 and 2 are the golden ones."""

    def make(vae: str = "vae_img", **tables: Tensor) -> list[str]:
        context = numbers("sampler")["context"]
        zero = torch.zeros_like(context[:1])
        torch.save(
            {**weights("dit"), **(tables or {"class_emb": torch.cat([zero, context, zero])})}, tmp_path / "d.bin"
        )
        save_file(weights(vae), tmp_path / "v.safetensors")
        paths = ["--dit", str(tmp_path / "d.bin"), "--vae", str(tmp_path / "v.safetensors")]
        return ["import-upstream", *paths, "--out", str(tmp_path / "out"), *SMALL]

    return make


def sampled(pipeline: ARDiffusionPipeline, noise: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """The latents and the video that the pipeline makes of ``noise``."""
    decoded: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ardiff.pipeline, "initial_noise", lambda seeds, *sizes: noise)
        decode = pipeline.vae.decode
        patch.setattr(
            pipeline.vae, "decode", lambda latents, cache: (decoded.append(latents), decode(latents, cache))[1]
        )
        video = pipeline(
            num_frames=noise.shape[1], num_inference_steps=10, mode="full", seed=list(range(len(noise))), **settings
        )
    return torch.cat(decoded, dim=1), video


@pytest.mark.parametrize("frames", [4, 7])
@pytest.mark.parametrize(("ar_step", "scale"), [(5, 2.0), (10, 1.0)])
def test_a_pipeline_that_samples_what_the_authors_code_does(
    files, weights, numbers, tmp_path, capsys, frames, ar_step, scale
):
    golden = numbers("sampler")
    assert main(files("vae_wt")) == 0
    said = capsys.readouterr().out
    assert "4 frames, 3 classes, 5 condition tokens" in said
    assert "64 x 64 pixels, temporal attention in clips" in said
    assert "mode=full" in said
    pipeline = ARDiffusionPipeline.from_pretrained(str(tmp_path / "out"))
    noise, settings = golden[f"xT_{frames}"], {"ar_step": ar_step, "guidance_scale": scale}
    latents, video = sampled(pipeline, noise, class_label=[1, 2], **settings)
    assert float((latents - golden[f"zfrozen_F{frames}_s{ar_step}_g{scale}"]).abs().max()) < 2e-4
    vae = load_vae(weights("vae_wt"), num_heads=2, image_size=64, num_frames=4)
    with torch.no_grad():
        pixels = vae.decode(latents).clamp(0, 1) * 255
    assert (video - pixels.permute(0, 1, 3, 4, 2)).abs().max() < 1.01


def test_a_model_without_classes_is_guided_away_from_zero_tokens(files, numbers, tmp_path, capsys):
    golden = numbers("sampler")
    assert main(files(context_emb=golden["context"][1])) == 0
    assert "no classes, 5 condition tokens" in capsys.readouterr().out
    pipeline = ARDiffusionPipeline.from_pretrained(str(tmp_path / "out"))
    latents, _ = sampled(pipeline, golden["xT_4"][1:], ar_step=2, guidance_scale=2.0)
    assert float((latents - golden["zfrozen_F4_s2_g2.0"][1:]).abs().max()) < 2e-4
    with pytest.raises(ValueError, match="the model knows no class at all"):
        pipeline(class_label=0, mode="full")


def test_what_the_authors_trainer_kept(files, weights, numbers, tmp_path, capsys):
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
    for ours, theirs in ((made.dit, expected.dit), (made.vae, expected.vae)):
        assert ours.config == theirs.config
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert main([*call, "--vae", str(tmp_path / "v.safetensors")]) == 0
    assert "left aside" in capsys.readouterr().out
    torch.save({**state, "module.diffusion_model.alphas_cumprod": torch.rand(1000)}, tmp_path / "all.bin")
    assert main(call) == 1
    assert "another noise schedule" in capsys.readouterr().err
    torch.save({**state, "module.diffusion_model.surprise": torch.rand(1)}, tmp_path / "all.bin")
    assert main(call) == 1
    assert "diffusion_model.surprise is unknown" in capsys.readouterr().err


def test_the_fast_modes_refuse_it_and_say_why(files, tmp_path, capsys):
    assert main(files()) == 0
    pipeline = ARDiffusionPipeline.from_pretrained(str(tmp_path / "out"))
    for mode in ("window", "rolling"):
        with pytest.raises(ValueError, match=r"condition tokens see all frames and carry later ones.*mode=full"):
            pipeline(num_frames=4, num_inference_steps=4, mode=mode)
    call = ["generate", "--pipeline", str(tmp_path / "out"), "--num-frames", "4", "--output", str(tmp_path / "videos")]
    assert main(call) == 2
    assert "sample it with mode=full" in capsys.readouterr().err
    assert not (tmp_path / "videos").exists()


def test_strict_causal(files, numbers, tmp_path, capsys):
    golden = numbers("sampler")
    assert main([*files(), "--strict-causal"]) == 0
    assert "Warning: with --strict-causal" in capsys.readouterr().out
    pipeline = ARDiffusionPipeline.from_pretrained(str(tmp_path / "out"))
    assert pipeline.dit.config.condition_attention == "self"
    latents, _ = sampled(pipeline, golden["xT_4"], class_label=[1, 2], ar_step=5, guidance_scale=2.0)
    assert float((latents - golden["zfrozen_F4_s5_g2.0"]).abs().max()) > 1e-2
    with pytest.raises(ValueError, match=r"by modulation only.*mode=full"):
        pipeline(num_frames=4, num_inference_steps=4)


def test_given_frames_become_latents_of_length_1(files, tmp_path):
    assert main(files("vae_wt")) == 0
    pipeline = ARDiffusionPipeline.from_pretrained(str(tmp_path / "out"))
    assert pipeline.statistics == LatentStatistics([[0.0] * 4] * 8, 1.0)
    frames = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = pipeline.vae.latents(to_unit(frames[None]))
    assert torch.allclose(latents.norm(dim=-1), torch.ones(1, 2, 8), atol=1e-5)
    settings = {"num_frames": 4, "num_inference_steps": 4, "ar_step": 2, "mode": "full", "seed": 1}
    video = pipeline(condition=frames, **settings)
    with torch.no_grad():
        expected = pipeline.vae.decode(latents)
    assert (video[:, :2] - (expected.clamp(-1, 1) + 1).permute(0, 1, 3, 4, 2) * 127.5).abs().max() < 1.01
    assert torch.equal(torch.stack(list(pipeline.stream(condition=frames, **settings)), dim=1), video)


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
