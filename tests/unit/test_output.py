"""What a call of the pipeline returns, and the arguments that users of diffusers pass."""

import io
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import pytest
import torch

from ardiff.data.encode import encode_video
from ardiff.pipeline import ARDiffusionPipeline

SHORT = {"num_frames": 6, "ar_step": 2, "num_inference_steps": 4, "class_label": 1}
VIDEOS = {**SHORT, "seed": [5, 6]}


@pytest.fixture(scope="module")
def pipeline(make_pipeline) -> ARDiffusionPipeline:
    return make_pipeline()


def test_every_output_type_holds_the_same_pixels(pipeline: ARDiffusionPipeline) -> None:
    expected = pipeline(**VIDEOS).frames.numpy()
    array = pipeline(**VIDEOS, output_type="np").frames
    tensor = pipeline(**VIDEOS, output_type="pt").frames
    pictures = pipeline(**VIDEOS, output_type="pil").frames
    assert (array.dtype, array.shape) == (np.float32, (2, 6, 16, 16, 3))
    assert (tensor.dtype, tensor.shape) == (torch.float32, (2, 6, 3, 16, 16))
    assert np.array_equal((array * 255).round().astype(np.uint8), expected)
    assert np.array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), array)
    assert np.array_equal(np.stack([[np.asarray(picture) for picture in video] for video in pictures]), expected)


def test_mp4_is_a_file_per_video(pipeline: ARDiffusionPipeline) -> None:
    expected = pipeline(**VIDEOS).frames.numpy()
    files = pipeline(**VIDEOS, output_type="mp4", fps=5).frames
    assert len(files) == 2
    for file, video in zip(files, expected, strict=True):
        with av.open(io.BytesIO(file)) as container:
            [stream] = container.streams.video
            assert (stream.codec_context.name, stream.average_rate, stream.frames) == ("h264", 5, 6)
        assert file == encode_video(video, 5)


def test_wrong_forms_are_refused_before_sampling(pipeline: ARDiffusionPipeline) -> None:
    def fail(*arguments: Any) -> None:
        raise AssertionError("sampling has started")

    with pytest.raises(ValueError, match="output_type must be one of uint8, np, pt, pil, mp4, got 'latent'"):
        pipeline(**SHORT, output_type="latent", callback_on_step_end=fail)
    with pytest.raises(ValueError, match="fps must be positive, got 0"):
        pipeline(**SHORT, output_type="mp4", fps=0, callback_on_step_end=fail)


def test_a_generator_draws_a_seed_for_each_video(pipeline: ARDiffusionPipeline) -> None:
    def generator(seed: int = 3) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    classes = {**SHORT, "class_label": [1, 1]}
    used = generator()
    videos = pipeline(**classes, generator=used).frames
    assert torch.equal(pipeline(**classes, generator=generator()).frames, videos)
    assert not torch.equal(videos[0], videos[1])
    assert not torch.equal(pipeline(**classes, generator=used).frames, videos)  # its state has advanced
    several = pipeline(**SHORT, generator=[generator(), generator(4), generator()]).frames
    assert torch.equal(several[0], several[2])
    assert not torch.equal(several[0], several[1])
    assert (several[0].int() - videos[0].int()).abs().max() <= 1
    with pytest.raises(ValueError, match="either seed or generator"):
        pipeline(**SHORT, seed=1, generator=generator())


def iterations(pipeline: ARDiffusionPipeline, **settings: Any) -> Iterator[tuple[int, list[int]]]:
    calls: list[tuple[int, list[int]]] = []

    def callback(caller: ARDiffusionPipeline, step: int, timesteps: torch.Tensor, kwargs: dict[str, Any]) -> dict:
        assert caller is pipeline
        calls.append((step, timesteps.tolist()))
        return kwargs

    pipeline(**{**SHORT, **settings}, callback_on_step_end=callback)
    return calls


@pytest.mark.parametrize("mode", ["window", "full"])
def test_the_callback_sees_each_iteration(pipeline: ARDiffusionPipeline, mode: str) -> None:
    calls = iterations(pipeline, mode=mode, num_frames=3)
    a, b, c, clean = 751, 501, 251, 1  # the last step is made at the clean timestep
    assert calls == [
        (0, [b, a, a]),
        (1, [c, a, a]),
        (2, [clean, b, a]),
        (3, [clean, c, a]),
        (4, [clean, clean, b]),
        (5, [clean, clean, c]),
        (6, [clean, clean, clean]),
        (7, [clean, clean, clean]),
    ]


def test_an_iteration_that_only_stores_the_sink_is_not_counted(pipeline: ARDiffusionPipeline) -> None:
    given = torch.zeros(8, 16, 16, 3, dtype=torch.uint8)
    settings = {"num_frames": 10, "condition": given, "sink_frames": 1}
    window, full = (iterations(pipeline, mode=mode, **settings) for mode in ("window", "full"))
    assert window == full
    assert [step for step, _ in window] == list(range(4 + 2))
    assert all(timesteps[:8] == [1] * 8 for _, timesteps in window)


def test_an_exception_in_the_callback_stops_the_call(pipeline: ARDiffusionPipeline) -> None:
    class EnoughError(Exception):
        pass

    def stop(caller: ARDiffusionPipeline, step: int, timesteps: torch.Tensor, kwargs: dict[str, Any]) -> None:
        if step == 2:
            raise EnoughError

    with pytest.raises(EnoughError):
        pipeline(**SHORT, callback_on_step_end=stop)
    assert pipeline(**SHORT).frames.shape[1] == 6


def test_to_takes_what_modules_take(make_pipeline) -> None:
    pipeline = make_pipeline()
    for arguments, expected in [
        (("cpu",), torch.float32),
        ((torch.bfloat16,), torch.bfloat16),
        (("cpu", torch.float32), torch.float32),
    ]:
        assert pipeline.to(*arguments) is pipeline
        assert {parameter.dtype for parameter in pipeline.dit.parameters()} == {expected}
        assert pipeline.vae_dtype == expected
    assert pipeline.to(device="cpu", dtype=torch.bfloat16).vae_dtype == torch.bfloat16
