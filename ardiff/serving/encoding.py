"""Turns the finished latents of one job into video fragments.

Shapes: k given frames, n frames finished together, L tokens, D latent width, H W pixels.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ardiff.errors import ArdiffError
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.resolution import Resolution
from ardiff.sampling.request import FinishedFrames, SampleRequest
from ardiff.sampling.saved import SavedState, unpack_latents
from ardiff.serving.config import ServiceConfig
from ardiff.serving.errors import JobError
from ardiff.serving.fragments import FragmentWriter
from ardiff.serving.jobs import Job
from ardiff.serving.store import Segment
from ardiff.vae import DecoderCache

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fragment:
    """New bytes of a job's video."""

    encoder: "JobEncoder"
    data: bytes
    num_frames: int
    last: bool
    latents: torch.Tensor | None = None
    """Those of generated frames, ``(1, n, L, D)``; None at the start."""


class JobEncoder:
    """The AR-VAE decoder's cache and the video encoder of a running job."""

    def __init__(self, job: Job, pipeline: ARDiffusionPipeline, config: ServiceConfig, fingerprint: str) -> None:
        """``fingerprint`` is that of the pipeline."""
        self.job, self.pipeline, self.fingerprint = job, pipeline, fingerprint
        self.iterations = 0
        """Iterations of the engine."""
        self.begun = job.record.lease
        """The lease under which the video began; after ``start``."""
        self._config = config
        self._given: torch.Tensor | None = None
        self._writer: FragmentWriter | None = None
        self._reset()

    def _reset(self) -> None:
        """Before the first frame."""
        self.num_frames = 0
        """Frames sent."""
        self.state: SavedState | None = None
        """The state of the sampling after them; None before a generated one."""
        self.replayed = b""
        """The stream so far, if another replica began it."""
        self._final: list[torch.Tensor] = []  # latents of generated frames, (1, n, L, D)
        self._decoder_cache, self._hash = DecoderCache(), hashlib.sha256()
        self._bytes, self._header = 0, b""

    @property
    def media_type(self) -> str | None:
        """The MIME type of the video; None before ``start``."""
        return None if self._writer is None else self._writer.media_type

    @property
    def frames_sha256(self) -> str:
        """Hash of all frames sent, before encoding."""
        return self._hash.hexdigest()

    def start(self, check: Callable[[SampleRequest], object]) -> SampleRequest:
        """Encodes the given frames to latents, and the prompts. Returns the request for the engine, which continues
        after the last frame that was encoded, here or by another replica.

        Args:
            check: Raises ValueError if the engine cannot take a request.
        """
        if self._writer is None:
            if self.job.given_frames is not None:
                with torch.inference_mode():
                    given_frames = torch.from_numpy(self.job.given_frames)
                    self._given = self.pipeline.encode_condition(given_frames, None, 1, self._size)
            self._open()
            if self.job.begun_elsewhere:
                try:
                    self._replay(self.job.begun_elsewhere, check)
                except (ArdiffError, ValueError) as error:
                    logger.warning("%s cannot be continued, so it begins again: %s", self.job.record.id, error)
                    self._open()
        return self._request()

    @property
    def _size(self) -> Resolution:
        return self.pipeline.info.shape_of(self.job.record.sampling)

    def _open(self) -> None:
        """Begins the video."""
        self._reset()
        size, config = self._size, self._config
        self._writer = FragmentWriter(size.height, size.width, self.job.record.fps, config.codec, config.crf)
        self._header = self._writer.start()

    def _request(self) -> SampleRequest:
        sampling, long_prompts = self.job.record.sampling, self._config.engine.long_prompts
        prompts = self.pipeline.text.encode(sampling.texts, self.pipeline.device, long_prompts)
        clean = [latents.to(self.pipeline.device) for latents in (self._given, *self._final) if latents is not None]
        return SampleRequest(
            videos=(sampling,),
            condition=torch.cat(clean, dim=1) if clean else None,
            prompts=prompts,
            shape=self.pipeline.info.shape_index(sampling),
            resume=self.state,
        )

    def _replay(self, published: Sequence[Segment], check: Callable[[SampleRequest], object]) -> None:
        """Decodes and encodes the frames that another replica has generated, so that decoder, encoder and hash are as
        if this one had. Raises ValueError or ArdiffError unless it gives the bytes that readers may have."""
        assert self._writer is not None
        if self.job.record.pipeline != self.fingerprint:
            raise ValueError("another pipeline began it")
        final = [frame for segment in published for frame in unpack_latents(segment.latents)]
        self.state, self._final = SavedState.from_bytes(published[-1].state or b""), final
        check(self._request())
        parts = [self._encode(latents, self._writer) for latents in (self._given, *final) if latents is not None]
        stream = b"".join([self._header, *parts])
        if stream != b"".join(segment.data for segment in published):
            raise ValueError("this replica decodes or encodes its frames to other bytes")
        self.replayed, self._bytes, self._header = stream, len(stream), b""
        self.begun = self.job.record.begun

    def encode(self, finished: FinishedFrames | None, state: SavedState | None) -> Fragment:
        """Decodes and encodes finished frames, after which the sampling has this state. None is the (next) start."""
        assert self._writer is not None
        sent_before, last = self.num_frames, finished is not None and finished.done
        given = self._given if self.num_frames == 0 else None  # else they are sent already
        latents = given if finished is None else finished.latents
        data = b"" if latents is None else self._encode(latents, self._writer)
        if last:
            data += self._writer.finish()
        if data:  # the header waits for the first frame: an error before it still gets an HTTP status of its own
            data, self._header = self._header + data, b""
        self._bytes += len(data)
        if self._bytes > self._config.limits.video_bytes:
            raise JobError("too_large", f"The video is larger than {self._config.limits.video_bytes} bytes.")
        if finished is None:
            return Fragment(self, data, self.num_frames - sent_before, last)
        self._final.append(finished.latents.cpu())
        self.state = None if state is None else replace(state, moving=state.moving.cpu())
        return Fragment(self, data, self.num_frames - sent_before, last, self._final[-1])

    @torch.inference_mode()
    def _encode(self, latents: torch.Tensor, writer: FragmentWriter) -> bytes:
        if not torch.isfinite(latents).all():
            raise JobError("not_finite", "The model's output is not finite: try a smaller guidance_scale.")
        data = b""
        for frame in self.pipeline.decode(latents.to(self.pipeline.device), self._decoder_cache, self._size):
            pixels = frame[0].numpy()  # uint8 (H, W, 3)
            self._hash.update(pixels.tobytes())
            data += writer.add(pixels)
            self.num_frames += 1
        return data
