"""The pipeline: saved and loaded, one video whatever is generated beside it, and calls that cannot be answered."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ardiff.data.latents import LatentStatistics
from ardiff.diffusion.config import DiffusionConfig
from ardiff.errors import CheckpointError
from ardiff.pipeline import ARDiffusionPipeline, read_info
from ardiff.resolution import Resolution
from ardiff.sampling.params import InvalidParamError, SamplingParams, expand_params
from ardiff.sampling.request import SampleRequest

STEPS = 4
SHORT = {"num_frames": 6, "ar_step": 2, "num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def pipeline(make_pipeline) -> ARDiffusionPipeline:
    return make_pipeline()


def differ(first: torch.Tensor, second: torch.Tensor) -> int:
    assert first.dtype == second.dtype == torch.uint8
    return int((first.int() - second.int()).abs().max())


def latents(pipeline: ARDiffusionPipeline, **changes: Any) -> torch.Tensor:
    videos = expand_params(**{**SHORT, "guidance_scale": 1.5, **changes})
    return pipeline.engine().run(SampleRequest(videos=tuple(videos)))


def test_shape_and_type(pipeline: ARDiffusionPipeline) -> None:
    video = pipeline(class_label=[0, 1, 2], seed=[0, 1, 2], **SHORT).frames
    assert video.shape == (3, 6, 16, 16, 3)
    assert video.dtype == torch.uint8
    assert video.device.type == "cpu"
    assert not video.requires_grad
    assert pipeline(**SHORT).frames.shape == (1, 6, 16, 16, 3)


def test_saved_and_loaded_gives_the_same_video(pipeline: ARDiffusionPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(str(tmp_path / "model"))
    files = sorted(p.name for p in (tmp_path / "model").iterdir())
    assert files == ["config.json", "dit.safetensors", "vae.safetensors"]
    loaded = ARDiffusionPipeline.from_pretrained(str(tmp_path / "model"))
    assert (loaded.vae.config, loaded.dit.config) == (pipeline.vae.config, pipeline.dit.config)
    assert (loaded.diffusion, loaded.statistics) == (pipeline.diffusion, pipeline.statistics)
    assert loaded.class_names == ["disc", "ring", "square"]
    settings = {"class_label": [0, 2], "seed": [5, 6], "guidance_scale": 2.0, **SHORT}
    assert torch.equal(loaded(**settings).frames, pipeline(**settings).frames)


@pytest.mark.parametrize("variant", [{"positions": "sincos"}, {"attention_window": 3}, {"num_classes": 0}])
def test_every_variant_survives_saving(make_pipeline, tmp_path: Path, variant: dict[str, Any]) -> None:
    pipeline = make_pipeline(**variant)
    pipeline.save_pretrained(str(tmp_path))
    assert torch.equal(ARDiffusionPipeline.from_pretrained(str(tmp_path))(**SHORT).frames, pipeline(**SHORT).frames)


def test_weights_of_other_sizes_name_the_tensor(pipeline: ARDiffusionPipeline, make_pipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(str(tmp_path / "a"))
    make_pipeline(width=32).save_pretrained(str(tmp_path / "b"))
    (tmp_path / "b" / "dit.safetensors").rename(tmp_path / "a" / "dit.safetensors")
    with pytest.raises(
        CheckpointError, match=r"blocks\.0\.attention\.proj\.bias is \(32,\) in the file, \(16,\) in the"
    ):
        ARDiffusionPipeline.from_pretrained(str(tmp_path / "a"))


def test_a_missing_file_and_a_damaged_configuration(pipeline: ARDiffusionPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(str(tmp_path))
    (tmp_path / "dit.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"dit\.safetensors"):
        ARDiffusionPipeline.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ARDiffusionPipeline.from_pretrained(str(tmp_path))


def test_saving_over_an_older_model_replaces_it(make_pipeline, tmp_path: Path) -> None:
    make_pipeline(seed=1).save_pretrained(str(tmp_path))
    pipeline = make_pipeline(seed=2)
    pipeline.save_pretrained(str(tmp_path))
    assert torch.equal(ARDiffusionPipeline.from_pretrained(str(tmp_path))(**SHORT).frames, pipeline(**SHORT).frames)


def test_models_that_do_not_fit_together(make_dit, make_vae) -> None:
    with pytest.raises(CheckpointError, match=r"\(L, D\) = \(3, 4\) latents, the AR-DiT \(2, 4\)"):
        ARDiffusionPipeline(
            make_vae(num_tokens=3), make_dit(), DiffusionConfig(), LatentStatistics([[0.0] * 4] * 2, 1.0)
        )


def test_the_configuration_is_readable(pipeline: ARDiffusionPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["kind"] == "ar-diffusion-pipeline"
    assert config["dit"]["num_classes"] == 3
    assert config["diffusion"]["beta_end"] == 0.02
    assert config["latent_statistics"]["std"] == 0.8


@pytest.mark.parametrize("frames", [6, 14])
def test_the_same_seed_gives_the_same_video_whatever_the_batch(pipeline: ARDiffusionPipeline, frames: int) -> None:
    labels, seeds = (2, 0, 1, 0), (11, 5, 7, 6)
    together = latents(pipeline, class_label=labels, seed=seeds, num_frames=frames)
    settings = {**SHORT, "num_frames": frames, "guidance_scale": 1.5}
    videos = pipeline(class_label=list(labels), seed=list(seeds), **settings).frames
    for i, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
        alone = latents(pipeline, class_label=label, seed=seed, num_frames=frames)
        assert torch.allclose(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
        assert differ(videos[i], pipeline(class_label=label, seed=seed, **settings).frames[0]) <= 1
    reverse = pipeline(class_label=list(labels)[::-1], seed=list(seeds)[::-1], **settings).frames
    assert differ(reverse.flip(0), videos) <= 1


def test_repeated_calls_are_equal_and_draw_nothing_global(pipeline: ARDiffusionPipeline) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = pipeline(class_label=1, seed=3, **SHORT).frames
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(pipeline(class_label=1, seed=3, **SHORT).frames, first)


def test_seed_class_and_guidance_matter(pipeline: ARDiffusionPipeline) -> None:
    expected = latents(pipeline, class_label=0)
    changes: list[dict[str, Any]] = [
        {"class_label": 1},
        {"class_label": None},
        {"seed": 1},
        {"guidance_scale": 4.0},
        {"ar_step": 0},
    ]
    for change in changes:
        result = latents(pipeline, **{"class_label": 0, **change})
        assert float((result - expected).abs().max()) > 1e-3, change


def test_labels_and_seeds_are_paired(pipeline: ARDiffusionPipeline) -> None:
    alone = {(c, s): pipeline(class_label=c, seed=s, **SHORT).frames[0] for c in (0, 1) for s in (5, 6)}
    for labels, seeds, pairs in [
        ([0, 1], [5, 6], [(0, 5), (1, 6)]),
        (0, [5, 6], [(0, 5), (0, 6)]),
        ([0, 1], 5, [(0, 5), (1, 5)]),
        ([1], [5, 6], [(1, 5), (1, 6)]),
    ]:
        video = pipeline(class_label=labels, seed=seeds, **SHORT).frames
        assert len(video) == len(pairs)
        for ours, pair in zip(video, pairs, strict=True):
            assert differ(ours, alone[pair]) <= 1
    without = pipeline(seed=[5, 6], **SHORT).frames
    assert differ(without[1], pipeline(seed=6, **SHORT).frames[0]) <= 1
    with pytest.raises(ValueError, match="cannot pair 2 class_label, 3 seed"):
        pipeline(class_label=[0, 1], seed=[1, 2, 3], **SHORT)


def test_parameters_as_one_object_are_the_same_call(pipeline: ARDiffusionPipeline) -> None:
    params = SamplingParams(class_label=1, seed=5, **SHORT)
    expected = pipeline(class_label=1, seed=[5, 6], **SHORT).frames
    assert torch.equal(pipeline(params, seed=[5, 6]).frames, expected)
    assert torch.equal(pipeline(expand_params(params, seed=[5, 6])).frames, expected)
    [latest] = list(pipeline.stream(params, num_frames=1))
    assert latest.shape == (1, 16, 16, 3)


def test_unknown_parameters_name_the_nearest_one(pipeline: ARDiffusionPipeline) -> None:
    for call in (pipeline, lambda **changes: next(pipeline.stream(**changes))):
        with pytest.raises(TypeError, match=r"'num_frame': did you mean num_frames\?"):
            call(num_frame=3)
    with pytest.raises(TypeError, match="valid names: num_frames, "):
        pipeline(xyz=3)


def test_ar_step_defaults_to_the_nearest_valid_value(pipeline: ARDiffusionPipeline) -> None:
    settings = {"class_label": 1, "num_frames": 3, "num_inference_steps": STEPS}
    assert torch.equal(pipeline(**settings).frames, pipeline(ar_step=STEPS, **settings).frames)


def test_info_is_read_without_weights(pipeline: ARDiffusionPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(str(tmp_path))
    (tmp_path / "dit.safetensors").unlink()
    assert read_info(str(tmp_path)) == pipeline.info
    assert (pipeline.info.num_frames, pipeline.info.resolution) == (8, Resolution.square(16))
    assert (pipeline.info.modes, pipeline.info.class_names) == (("window", "full"), ("disc", "ring", "square"))
    with pytest.raises(CheckpointError, match="no pipeline"):
        read_info(str(tmp_path / "missing"))


@pytest.mark.parametrize("ar_step", [0, 1, 2, STEPS])
def test_a_longer_video_starts_like_a_shorter_one(pipeline: ARDiffusionPipeline, ar_step: int) -> None:
    """As long as both fit the window: a frame depends on the frames before it only."""
    settings = {"class_label": 0, "seed": 3, "num_inference_steps": STEPS, "ar_step": ar_step, "guidance_scale": 1.5}
    longest = pipeline(num_frames=8, **settings).frames
    for frames in (1, 3, 7):
        assert differ(pipeline(num_frames=frames, **settings).frames, longest[:, :frames]) <= 1


def test_videos_longer_than_the_model_sees(pipeline: ARDiffusionPipeline) -> None:
    video = pipeline(class_label=1, num_frames=21, ar_step=1, num_inference_steps=STEPS).frames
    assert video.shape == (1, 21, 16, 16, 3)
    first = pipeline(class_label=1, num_frames=8, ar_step=1, num_inference_steps=STEPS).frames
    assert differ(video[:, :8], first) <= 1  # nothing before the window first moves has changed
    plain = pipeline(class_label=1, num_frames=21, ar_step=1, num_inference_steps=STEPS, mode="full").frames
    assert differ(video, plain) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ar_step": -1}, r"ar_step must be between 0 and num_inference_steps \(4\).*smallest valid ar_step is 0"),
        ({"ar_step": 5}, r"ar_step must be between 0 and .*got 5"),
        ({"num_frames": 20, "ar_step": 0}, r"window of 8 frames; got 0\. The smallest valid ar_step is 1"),
        ({"num_frames": 20, "num_inference_steps": 50, "ar_step": 6}, "smallest valid ar_step is 7"),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"num_inference_steps": 0, "ar_step": 0}, "num_inference_steps must be between 1 and 1000, got 0"),
        ({"num_inference_steps": 1001}, r"num_inference_steps must be between 1 and 1000"),
        ({"class_label": 3}, r"class_label 3 is out of range: the model has classes 0\.\.2"),
        ({"class_label": [0, -1]}, "class_label -1 is out of range"),
        ({"seed": []}, "cannot pair"),
        ({"class_label": [], "seed": []}, "cannot pair"),
        ({"mode": "magic"}, "mode"),
    ],
)
@pytest.mark.parametrize("mode", ["window", "full"])
def test_calls_out_of_range_say_what_is_valid(
    pipeline: ARDiffusionPipeline, mode: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(**{**SHORT, "mode": mode, **changes})


def test_bidirectional_attention_is_sampled_plainly_only(make_pipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline(attention="bidirectional")
    pipeline.save_pretrained(str(tmp_path))
    loaded, settings = ARDiffusionPipeline.from_pretrained(str(tmp_path)), {**SHORT, "seed": [1, 2], "class_label": 1}
    videos = loaded(mode="full", **settings).frames
    assert torch.equal(videos, pipeline(mode="full", **settings).frames)
    assert not torch.equal(videos[0], videos[1])
    for mode in ("window", "rolling"):
        with pytest.raises(ValueError, match=r"sees a later one.*dit\.attention=bidirectional.*mode=full"):
            pipeline(mode=mode, **settings)


def test_a_model_without_classes_takes_none(make_pipeline) -> None:
    pipeline = make_pipeline(num_classes=0)
    assert pipeline(**SHORT).frames.shape[0] == 1
    with pytest.raises(ValueError, match="has no classes"):
        pipeline(class_label=0, **SHORT)


def test_progress_grows_to_all_frames(pipeline: ARDiffusionPipeline) -> None:
    counts: list[int] = []
    pipeline(on_frames=counts.append, **SHORT)
    assert counts == sorted(set(counts))
    assert counts[-1] == 6


def test_a_pipeline_of_rectangles(make_pipeline, make_vae, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    pipeline.vae = make_vae(seed=1, resolution=[16, 40])
    pipeline.save_pretrained(str(tmp_path))
    assert read_info(str(tmp_path)).resolution == (16, 40)
    again = ARDiffusionPipeline.from_pretrained(str(tmp_path))
    settings = {"num_frames": 4, "num_inference_steps": STEPS, "ar_step": 1, "seed": 0}
    frames = pipeline(**settings).frames
    assert frames.shape == (1, 4, 16, 40, 3)
    assert torch.equal(again(**settings).frames, frames)
    given = frames[0, :2]
    assert pipeline(**settings, condition=given).frames.shape == (1, 4, 16, 40, 3)
    with pytest.raises(ValueError, match=r"must be uint8 \(k, 16, 40, 3\) or"):
        pipeline(**settings, condition=given.transpose(1, 2))


SHAPES = {"resolution": [16, 16], "buckets": [[16, 40], [40, 16]]}
SIZED = {"num_frames": 12, "num_inference_steps": STEPS, "ar_step": 2, "seed": 0, "class_label": 1}


@pytest.fixture(scope="module")
def several(make_pipeline, make_vae) -> ARDiffusionPipeline:
    """A pipeline of three shapes."""
    pipeline = make_pipeline(num_shapes=3)
    pipeline.vae = make_vae(seed=1, **SHAPES)
    return pipeline


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(
    ("size", "shape"), [(None, (16, 16)), ("16x16", (16, 16)), ("40x16", (16, 40)), ("16x40", (40, 16))]
)
def test_sizes(several: ARDiffusionPipeline, size: str | None, shape: tuple[int, int], scale: float) -> None:
    """The engine, with its caches, gives what the whole model gives; the shape is a condition of every frame."""
    frames = several(size=size, guidance_scale=scale, **SIZED).frames
    assert frames.shape == (1, 12, *shape, 3)
    whole = several(size=size, guidance_scale=scale, mode="full", **SIZED).frames
    assert (frames.int() - whole.int()).abs().max() <= 1
    assert several.info.shape_of(SamplingParams(size=size)) == shape


def test_the_latents_depend_on_the_size(several: ARDiffusionPipeline) -> None:
    of_sizes = [torch.cat(list(several.stream_latents(size=s, **SIZED)), dim=1) for s in ("16x16", "40x16", "16x40")]
    for one, other in itertools.combinations(of_sizes, 2):
        assert not torch.allclose(one, other, atol=1e-2)
    guided = [
        torch.cat(list(several.stream_latents(size=s, guidance_scale=0.0, **SIZED)), dim=1) for s in ("16x16", "40x16")
    ]
    assert not torch.allclose(*guided, atol=1e-2)  # without a class, but of a shape


def test_requests_of_different_sizes_share_an_engine(several: ARDiffusionPipeline) -> None:
    expected = [torch.cat(list(several.stream_latents(size=size, **SIZED)), dim=1) for size in ("16x16", "40x16")]
    engine = several.engine()
    ids = [engine.submit(several._request([SamplingParams(size=s, **SIZED)], None, None)) for s in ("16x16", "40x16")]
    latents: dict[int, list[torch.Tensor]] = {request_id: [] for request_id in ids}
    while engine.busy:
        for finished in engine.step():
            latents[finished.request_id].append(finished.latents)
    for request_id, alone in zip(ids, expected, strict=True):
        assert torch.allclose(torch.cat(latents[request_id], dim=1), alone, atol=1e-4)


def test_given_frames_have_the_size(several: ARDiffusionPipeline) -> None:
    given = several(size="40x16", **SIZED).frames[0, :2]
    settings = {**SIZED, "num_frames": 4}
    assert several(size="40x16", condition=given, **settings).frames.shape == (1, 4, 16, 40, 3)
    with pytest.raises(ValueError, match=r"must be uint8 \(k, 16, 16, 3\)"):
        several(condition=given, **settings)


def test_other_sizes_are_refused(several: ARDiffusionPipeline, make_pipeline, tmp_path: Path) -> None:
    with pytest.raises(InvalidParamError, match="size is 20x20: the model makes 16x16, 40x16 or 16x40 only"):
        several(size="20x20", **SIZED)
    with pytest.raises(InvalidParamError, match="the model makes 16x16 only"):
        make_pipeline()(size="40x16", **SIZED)
    several.save_pretrained(str(tmp_path))
    assert read_info(str(tmp_path)) == several.info
    again = ARDiffusionPipeline.from_pretrained(str(tmp_path))
    assert torch.equal(again(size="16x40", **SIZED).frames, several(size="16x40", **SIZED).frames)
