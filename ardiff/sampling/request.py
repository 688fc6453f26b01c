"""Requests to the sampling engine, and what it returns.

Shapes: B videos, F frames, L tokens, D latent width, M text tokens, E their width.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from ardiff.dit import DiT, DiTConfig
from ardiff.sampling.cost import final_frames, started_frames
from ardiff.sampling.params import PER_VIDEO, SamplingParams
from ardiff.sampling.saved import SavedState


class PromptKey(NamedTuple):
    """What the keys and values of a prompt depend on."""

    digest: str
    """Hash of the token states; empty for no text."""
    num_tokens: int


NO_TEXT = PromptKey("", 1)
"""The learned token that stands for no text."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPrompt:
    """A prompt as the model reads it."""

    states: Tensor
    """Token states of the text encoder, float32 ``(M, E)``, without padding."""
    key: PromptKey

    @classmethod
    def of(cls, states: Tensor) -> "EncodedPrompt":
        """The prompt of token states ``(M, E)``."""
        states = states.float().cpu().contiguous()
        return cls(states, PromptKey(hashlib.sha256(states.numpy().tobytes()).hexdigest(), len(states)))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleRequest:
    """Videos that are sampled together. Their parameters may differ in those of a single video only, as ``seed``."""

    videos: tuple[SamplingParams, ...]
    """Parameters of each video; ``mode`` is ``window`` or ``rolling``."""
    condition: Tensor | None = None
    """Clean latents of the given frames, ``(B, given_frames, L, D)``, and with ``resume`` of those that are final
    since; None without any."""
    prompts: Mapping[str, EncodedPrompt] = field(default_factory=dict)
    """Every text of the videos, encoded."""
    shape: int = 0
    """Index of the shape of the frames among those of the model."""
    resume: SavedState | None = None
    """Where another engine has stopped; the conditions of the videos include all changes since their start."""

    def __post_init__(self) -> None:
        if not self.videos:
            raise ValueError("a request must hold at least one video")
        if any(video.shared() != self.params.shared() for video in self.videos):
            raise ValueError(f"the videos of a request may differ in {', '.join(PER_VIDEO)} only")

    @property
    def params(self) -> SamplingParams:
        """The parameters of the first video; those of the others differ in the parameters of a single video only."""
        return self.videos[0]

    @property
    def iteration(self) -> int:
        """Iterations that another engine has made."""
        return 0 if self.resume is None else self.resume.iteration

    @property
    def started(self) -> int:
        """Frames that were given, or have started in another engine."""
        return started_frames(self.params, self.iteration)

    @property
    def final(self) -> int:
        """Frames that were given, or are final since."""
        return final_frames(self.params, self.iteration)

    @property
    def guided(self) -> bool:
        """Whether any frame of any video is guided."""
        return any(video.guided for video in self.videos)

    @property
    def sequences(self) -> int:
        """Sequences that the model evaluates: one per video, two with guidance."""
        return len(self.videos) * (2 if self.guided else 1)

    @property
    def starts(self) -> tuple[int, ...]:
        """Frame 0, and the frames at which the condition of any video changes."""
        return tuple(sorted({0, *(change.frame for video in self.videos for change in video.conditions)}))

    def labels(self, model: DiT, frame: int = 0) -> list[int]:
        """The class index of each sequence at a frame, as the model takes it; with guidance, the second half has no
        class."""
        classes = [video.condition_of(frame).class_label for video in self.videos]
        labels = [model.unlabelled if label is None else label for label in classes]
        labels += [model.null_class] * (self.sequences - len(labels))
        return [model.label(label, self.shape) for label in labels]

    def distinct_labels(self, model: DiT) -> list[int]:
        """The class indices of all sequences and frames."""
        return list(dict.fromkeys(label for start in self.starts for label in self.labels(model, start)))

    def texts(self, frame: int) -> list[str | None]:
        """The text of each sequence at a frame; with guidance, that of the second half is the negative prompt."""
        texts = [video.condition_of(frame).prompt for video in self.videos]
        return texts + [video.negative_prompt for video in self.videos][: self.sequences - len(texts)]

    def prompt_keys(self, frame: int) -> list[PromptKey]:
        """The prompt of each sequence at a frame. Raises ValueError if its text is not encoded."""
        return [self.prompt(text).key if text else NO_TEXT for text in self.texts(frame)]

    def prompt(self, text: str) -> EncodedPrompt:
        """An encoded text. Raises ValueError if it is not encoded."""
        if text not in self.prompts:
            raise ValueError(f"the prompt {text[:64]!r} is not encoded: the request must hold it in prompts")
        return self.prompts[text]

    def without_past(self, frame: int) -> "SampleRequest":
        """The request for the frames from ``frame`` on, without the changes and their prompts of frames before it."""
        videos = tuple(video.without_past(frame) for video in self.videos)
        texts = {text for video in videos for text in video.texts}
        prompts = {text: prompt for text, prompt in self.prompts.items() if text in texts}
        request = replace(self, videos=videos, prompts=prompts)
        return request if request.guided == self.guided else self

    def guidance_scales(self, frame: int) -> list[float]:
        """The strength of guidance of each video at a frame."""
        scales = [video.condition_of(frame).guidance_scale for video in self.videos]
        return [1.0 if scale is None else scale for scale in scales]

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
        moving = params.num_frames if ar_step == 0 else -(-params.resolved_num_inference_steps // ar_step) + 2
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
