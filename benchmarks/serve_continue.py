"""The table of ``benchmarks/serve.py --part continue``: what it costs to continue a video of another replica.

CPU time of one process, which runs the engine, the decoder and the encoder of one video alone.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, replace

from ardiff.pipeline import ARDiffusionPipeline
from ardiff.sampling.cost import sequential_passes
from ardiff.sampling.params import SamplingParams, validate
from ardiff.serving.config import ServiceConfig
from ardiff.serving.encoding import JobEncoder
from ardiff.serving.jobs import Job
from ardiff.serving.records import JobRecord, new_id
from ardiff.serving.store import Segment


def _generate(encoder: JobEncoder, pipeline: ARDiffusionPipeline, count: int, frames_per_segment: int) -> list[Segment]:
    """Runs a video until ``count`` frames are final. Returns its segments as they are published."""
    engine, job, segments = pipeline.engine(), encoder.job, list[Segment]()
    request_id = engine.submit(encoder.start(engine.check))
    job.log.add(encoder.encode(None, None).data)
    while encoder.num_frames < count:
        for frames in engine.step():
            fragment = encoder.encode(frames, None if frames.done else engine.save(request_id))
            assert fragment.latents is not None
            job.log.add(fragment.data)
            job.latents.append(fragment.latents)
            job.state = encoder.state
            if encoder.num_frames % frames_per_segment == 0 and (segment := job.next_segment()) is not None:
                segments.append(segment)
                job.record = replace(job.record, stream_bytes=segment.start + len(segment.data))
    return segments


def _cpu_seconds(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def print_continuation(pipeline: ARDiffusionPipeline, frames: int = 128, frames_per_segment: int = 8) -> None:
    """Prints bytes of the stored state, and CPU seconds of a whole video, of its second half, and of the repeated
    part when another replica generates that half."""
    params = validate(SamplingParams(num_frames=frames, num_inference_steps=20, ar_step=5, seed=1), pipeline.info)
    shape = pipeline.info.shape_of(params)
    record = JobRecord(
        id=new_id(),
        owner="benchmark",
        kind="job",
        model="model",
        params=asdict(params),
        fps=8.0,
        size=shape.size,
        iterations=sequential_passes(params),
        created_at=time.time(),
        lease=1,
    )
    config, half = ServiceConfig(), frames // 2

    def encoder(published: list[Segment], lease: int) -> JobEncoder:
        job = Job(replace(record, lease=lease, begun=1, pipeline="same"), None, asyncio.Event(), published)
        return JobEncoder(job, pipeline, config, "same")

    segments = _generate(encoder([], 1), pipeline, half, frames_per_segment)  # warm-up
    whole = _cpu_seconds(lambda: _generate(encoder([], 1), pipeline, frames, frames_per_segment))
    first = _cpu_seconds(lambda: _generate(encoder([], 1), pipeline, half, frames_per_segment))
    second = encoder(segments, 2)
    replay = _cpu_seconds(lambda: second.start(pipeline.engine().check))
    rest = encoder(segments, 2)
    continued = _cpu_seconds(lambda: _generate(rest, pipeline, frames, frames_per_segment))
    assert rest.begun == 1
    print(f"{frames} frames, {frames_per_segment} per segment; another replica continues after {half}")
    print("| what | value |\n|---|---|")
    print(
        f"| bytes of a segment: video, latents, state | {_mean([s.data for s in segments])}, "
        f"{_mean([s.latents for s in segments])}, {_mean([s.state or b'' for s in segments])} |"
    )
    print(f"| CPU seconds: whole video, its first half | {whole:.2f}, {first:.2f} |")
    print(f"| CPU seconds of the second replica, of which to repeat the stream | {continued:.2f}, {replay:.2f} |")


def _mean(parts: list[bytes]) -> int:
    return sum(map(len, parts)) // len(parts)
