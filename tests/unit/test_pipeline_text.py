"""The pipeline with text: prompts, the text encoder that its folder names, and what does not fit."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_text import ToyEncoder

from ardiff.data.texts import UsedEncoder
from ardiff.errors import CheckpointError
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.sampling import text as sampling_text
from ardiff.sampling.config import EngineConfig
from ardiff.sampling.params import InvalidParamError
from ardiff.train.export import describe_dit, write_trained

SHORT: dict[str, Any] = {"num_frames": 4, "num_inference_steps": 3, "ar_step": 1}
TEXT: dict[str, Any] = {"condition": "cross_attention", "condition_dim": 5}


def latents(pipeline: ARDiffusionPipeline, **settings: Any) -> torch.Tensor:
    return torch.cat(list(pipeline.stream_latents(**{**SHORT, **settings})), dim=1)


@pytest.fixture
def encoder() -> ToyEncoder:
    return ToyEncoder()


@pytest.fixture
def pipeline(make_pipeline, encoder: ToyEncoder) -> ARDiffusionPipeline:
    return make_pipeline(text_encoder=encoder, **TEXT)


@pytest.fixture
def load_toy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The toy encoder stands for every encoder that is loaded. Returns the places from which it was."""
    loaded: list[tuple[str, int]] = []

    def load(uri: str, device: Any, dtype: torch.dtype, max_tokens: int) -> ToyEncoder:
        loaded.append((uri, max_tokens))
        return ToyEncoder("another" if uri == "elsewhere" else "f00d", max_tokens)

    monkeypatch.setattr(sampling_text, "load_encoder", load)
    return loaded


def test_videos_follow_their_own_prompts(pipeline: ARDiffusionPipeline) -> None:
    prompts = ["a ring", "a red square", None, ""]
    together = latents(pipeline, prompt=prompts, seed=5)
    assert torch.equal(together[2], together[3])
    for row, prompt in enumerate(prompts):
        alone = latents(pipeline, prompt=prompt, seed=5)
        assert torch.allclose(together[row], alone[0], atol=1e-5)
        assert torch.allclose(alone, latents(pipeline, prompt=prompt, seed=5, mode="full"), atol=1e-5)
        others = [other for index, other in enumerate(together) if index != row and {index, row} != {2, 3}]
        assert not any(torch.allclose(alone[0], other, atol=1e-3) for other in others)
    video = pipeline(prompt="a ring", **SHORT).frames
    assert video.shape == (1, 4, 16, 16, 3)
    assert torch.equal(torch.stack(list(pipeline.stream(prompt="a ring", **SHORT)), dim=1), video)


def test_a_negative_prompt_takes_the_place_of_no_text(pipeline: ARDiffusionPipeline) -> None:
    settings = {"prompt": "a ring", "guidance_scale": 2.0}
    away = latents(pipeline, negative_prompt="a red square", **settings)
    assert torch.allclose(away, latents(pipeline, negative_prompt="a red square", mode="full", **settings), atol=1e-5)
    assert not torch.allclose(away, latents(pipeline, **settings), atol=1e-3)
    assert torch.equal(latents(pipeline, negative_prompt="", **settings), latents(pipeline, **settings))
    same = latents(pipeline, negative_prompt="a ring", **settings)
    assert torch.allclose(same, latents(pipeline, prompt="a ring"), atol=1e-5)


def test_each_text_is_encoded_once_and_alone(pipeline: ARDiffusionPipeline, encoder: ToyEncoder) -> None:
    settings = {"negative_prompt": "c", "guidance_scale": 2.0, "conditions": [(2, "b")]}
    for _ in range(2):
        latents(pipeline, prompt=["a", "b"], **settings)
    assert encoder.calls == [["a"], ["c"], ["b"]]
    latents(pipeline)
    latents(pipeline, prompt="")
    assert len(encoder.calls) == 3


def test_the_folder_records_the_encoder(pipeline: ARDiffusionPipeline, load_toy: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(str(tmp_path))
    recorded = json.loads((tmp_path / "config.json").read_text())["text_encoder"]
    assert recorded == {"uri": "toy", "fingerprint": "f00d", "dim": 5, "max_tokens": 8, "dtype": "float32"}
    loaded = ARDiffusionPipeline.from_pretrained(str(tmp_path))
    latents(loaded, class_label=1)
    assert load_toy == []  # not before the first prompt
    assert torch.equal(latents(loaded, prompt="a ring"), latents(pipeline, prompt="a ring"))
    assert load_toy == [("toy", 8)]
    moved = ARDiffusionPipeline.from_pretrained(str(tmp_path), text_encoder="moved")
    assert torch.equal(latents(moved, prompt="a ring"), latents(pipeline, prompt="a ring"))
    assert load_toy[1:] == [("moved", 8)]


def test_another_encoder_is_refused_at_the_first_prompt(
    pipeline: ARDiffusionPipeline, load_toy: Any, make_pipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(str(tmp_path))
    loaded = ARDiffusionPipeline.from_pretrained(str(tmp_path), text_encoder="elsewhere")
    latents(loaded)
    with pytest.raises(CheckpointError, match=r"toy \(another\) is not the one .* \(f00d\): give the URI"):
        latents(loaded, prompt="a ring")
    with pytest.raises(CheckpointError, match="are 6 wide, but the model takes 5"):
        make_pipeline(text_encoder=ToyEncoder(dim=6), **TEXT)
    with pytest.raises(CheckpointError, match=r"names no text encoder: give a loaded one to ARDiffusionPipeline"):
        latents(make_pipeline(**TEXT), prompt="a ring")


def test_long_prompts_are_cut_with_a_warning_or_refused(
    pipeline: ARDiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    long = "one two three four five six seven eight nine"
    with caplog.at_level(logging.WARNING):
        cut = latents(pipeline, prompt=long)
    assert "has more than the 8 tokens that are read: the rest of it has no effect" in caplog.text
    assert torch.equal(cut, latents(pipeline, prompt=long.removesuffix(" nine")))
    pipeline.engine_config = EngineConfig(long_prompts="error")
    with pytest.raises(InvalidParamError, match=r"shorten it, or set engine\.long_prompts=truncate"):
        latents(pipeline, prompt=long)
    with pytest.raises(InvalidParamError, match="a prompt must be text, got 3"):
        latents(pipeline, prompt=3)


def test_a_model_without_text_says_so_before_any_work(make_pipeline, encoder: ToyEncoder) -> None:
    pipeline = make_pipeline(text_encoder=encoder, condition_dim=5)
    with pytest.raises(InvalidParamError, match="the model takes no text: leave prompt out"):
        pipeline(prompt="a ring", **SHORT)
    assert not pipeline.info.text
    assert encoder.calls == []


def test_an_exported_model_keeps_its_encoder(pipeline: ARDiffusionPipeline, tmp_path: Path) -> None:
    from ardiff.data.latents import LatentSet, vae_fingerprint
    from ardiff.pretrained import save_autoencoder

    save_autoencoder(str(tmp_path / "vae"), pipeline.vae)
    key = vae_fingerprint(str(tmp_path / "vae"))
    latents_of_run = LatentSet(key, 8, 2, 4, [], [], [], pipeline.statistics, str(tmp_path / "vae"), key)
    source = UsedEncoder(uri="s3://bucket/encoder", fingerprint="f00d", dim=5, max_tokens=8, dtype="bfloat16")
    for text in (source, None):
        description = describe_dit(pipeline.dit.config, pipeline.diffusion, latents_of_run, [], text)
        weights = dict(pipeline.dit.named_parameters())
        write_trained(json.loads(json.dumps(description)), weights, str(tmp_path / "exported"))
        loaded = ARDiffusionPipeline.from_pretrained(str(tmp_path / "exported"))
        assert loaded.text.source == text
    moved = ARDiffusionPipeline.from_pretrained(str(tmp_path / "exported"), text_encoder="x")
    assert moved.text.source is None
    assert replace(source, uri="x") != source
