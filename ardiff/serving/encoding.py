"""Turns the finished latents of one job into video fragments.

Shapes: k given frames, n frames finished together, L tokens, D latent width, H W pixels.
"""

import hashlib
from dataclasses import dataclass

import torch

from ardiff.pipeline import ARDiffusionPipeline
from ardiff.sampling.request import FinishedFrames, SampleRequest
from ardiff.serving.config import ServiceConfig
from ardiff.serving.errors import JobError
from ardiff.serving.fragments import FragmentWriter
from ardiff.serving.jobs import Job
from ardiff.vae import DecoderCache


@dataclass(frozen=True, slots=True)
class Fragment:
    """New bytes of a job's video."""

    encoder: "JobEncoder"
    data: bytes
    num_frames: int
    last: bool


class JobEncoder:
    """The AR-VAE decoder's cache and the video encoder of a running job."""

    def __init__(self, job: Job, pipeline: ARDiffusionPipeline, config: ServiceConfig) -> None:
        self.job, self.pipeline = job, pipeline
        self.iterations = 0
        """Iterations of the engine since the (last) start."""
        self.num_frames = 0
        """Frames sent."""
        self._config = config
        self._decoder_cache = DecoderCache()
        self._decoded, self._bytes = 0, 0
        self._hash = hashlib.sha256()
        self._writer: FragmentWriter | None = None
        self._header = b""
        self._condition: torch.Tensor | None = None

    @property
    def media_type(self) -> str | None:
        """The MIME type of the video; None before ``start``."""
        return None if self._writer is None else self._writer.media_type

    @property
    def frames_sha256(self) -> str:
        """Hash of all frames sent, before encoding."""
        return self._hash.hexdigest()

    def start(self) -> SampleRequest:
        """Encodes the given frames to latents, and the prompts. Returns the request for the engine."""
        record = self.job.record
        if self._writer is None:
            size = self.pipeline.info.shape_of(record.sampling)
            self._writer = FragmentWriter(size.height, size.width, record.fps, self._config.codec, self._config.crf)
            self._header = self._writer.start()
            if self.job.given_frames is not None:
                with torch.inference_mode():
                    given_frames = torch.from_numpy(self.job.given_frames)
                    self._condition = self.pipeline.encode_condition(given_frames, None, 1, size)
        long_prompts = self._config.engine.long_prompts
        prompts = self.pipeline.text.encode(record.sampling.texts, self.pipeline.device, long_prompts)
        shape = self.pipeline.info.shape_index(record.sampling)
        return SampleRequest(videos=(record.sampling,), condition=self._condition, prompts=prompts, shape=shape)

    def restart(self) -> None:
        """Resets the job for a new engine. Frames that were sent are not sent again."""
        self.iterations, self._decoded = 0, 0
        self._decoder_cache = DecoderCache()

    def encode(self, finished: FinishedFrames | None) -> Fragment:
        """Decodes and encodes finished frames. None is the start, with the given frames, if any."""
        assert self._writer is not None
        sent_before, last = self.num_frames, finished is not None and finished.done
        latents = self._condition if finished is None else finished.latents
        data = b"" if latents is None else self._encode(latents, self._writer)
        if last:
            data += self._writer.finish()
        if data:  # the header waits for the first frame: an error before it still gets an HTTP status of its own
            data, self._header = self._header + data, b""
        self._bytes += len(data)
        if self._bytes > self._config.limits.video_bytes:
            raise JobError("too_large", f"The video is larger than {self._config.limits.video_bytes} bytes.")
        return Fragment(self, data, self.num_frames - sent_before, last)

    @torch.inference_mode()
    def _encode(self, latents: torch.Tensor, writer: FragmentWriter) -> bytes:
        if not torch.isfinite(latents).all():
            raise JobError("not_finite", "The model's output is not finite: try a smaller guidance_scale.")
        data, shape = b"", self.pipeline.info.shape_of(self.job.record.sampling)
        for frame in self.pipeline.decode(latents, self._decoder_cache, shape):  # uint8 (1, H, W, 3)
            self._decoded += 1
            if self._decoded > self.num_frames:
                pixels = frame[0].numpy()
                self._hash.update(pixels.tobytes())
                data += writer.add(pixels)
                self.num_frames += 1
        return data
