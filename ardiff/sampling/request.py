"""Requests to the sampling engine, and what it returns."""

from dataclasses import dataclass

from torch import Tensor

from ardiff.dit import DiT, DiTConfig
from ardiff.sampling.params import PER_VIDEO, SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleRequest:
    """Videos that are sampled together. Their parameters may differ in ``class_label`` and ``seed`` only."""

    videos: tuple[SamplingParams, ...]
    """Parameters of each video; ``mode`` is ``window`` or ``rolling``."""
    condition: Tensor | None = None
    """Clean latents of the given frames, ``(B, given_frames, L, D)``; None without given frames."""

    def __post_init__(self) -> None:
        if not self.videos:
            raise ValueError("a request must hold at least one video")
        if any(video.shared() != self.params.shared() for video in self.videos):
            raise ValueError(f"the videos of a request may differ in {' and '.join(PER_VIDEO)} only")

    @property
    def params(self) -> SamplingParams:
        """The parameters of the first video; those of the others differ in class and seed only."""
        return self.videos[0]

    @property
    def sequences(self) -> int:
        """Sequences that the model evaluates: one per video, two with guidance."""
        return len(self.videos) * (2 if self.params.guided else 1)

    def labels(self, model: DiT) -> list[int]:
        """The class index of each sequence as the model takes it; with guidance, the second half has no class."""
        labels = [model.unlabelled if v.class_label is None else v.class_label for v in self.videos]
        return labels + [model.null_class] * (self.sequences - len(labels))

    def window(self, config: DiTConfig) -> int | None:
        """Frames of the moving window, or None if a frame sees all earlier ones (up to the model's band)."""
        moving = self.params.mode == "window" and self.params.num_frames > config.num_frames
        return config.num_frames if moving else None

    def cache_frames(self, config: DiTConfig) -> int:
        """Frames that the cache must hold at once."""
        params, ar_step = self.params, self.params.resolved_ar_step
        if (window := self.window(config)) is not None:
            return window
        if config.attention_window is None:
            return params.num_frames
        moving = params.num_frames if ar_step == 0 else -(-params.num_inference_steps // ar_step) + 2
        # Twice the band, so that frames are rarely moved to the front of the cache.
        return min(params.num_frames, 2 * config.attention_window + moving + params.given_frames)


@dataclass(frozen=True, slots=True)
class FinishedFrames:
    """Frames of a request that an iteration finished."""

    request_id: int
    first_frame: int
    """Index of the first of these frames."""
    latents: Tensor
    """Clean latents ``(B, frames, L, D)``."""
    done: bool
    """Whether these frames complete the request."""
