"""Sampling parameters: :class:`SamplingParams`, and :func:`validate`, which checks them against a model.

The pipeline, the sampling engine, ``ardiff generate``, sweeps, the HTTP API and its client all use this class. No other
layer declares a sampling parameter: each reads ``dataclasses.fields(SamplingParams)``. To add a parameter, add a field
here, use it in the code that computes with it, and describe it in ``docs/sampling.md``.

This module does not import torch, so that a client starts fast.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from ardiff.config import fingerprint
from ardiff.diffusion.ar_step import check_ar_step, smallest_ar_step
from ardiff.diffusion.sampling_defaults import SamplingDefaults
from ardiff.diffusion.solver_names import Solver, TimestepSpacing
from ardiff.diffusion.student import Student
from ardiff.resolution import Resolution

SamplingMode = Literal["window", "rolling", "full"]
DEFAULT_AR_STEP = 5
MAX_PROMPT_LENGTH = 10_000
"""Characters of a prompt at most. Text encoders read a few hundred at most."""


class InvalidParamError(ValueError):
    """A sampling parameter is out of range, or the model cannot do what it asks for."""

    def __init__(self, param: str, message: str) -> None:
        """``param`` names the field of :class:`SamplingParams`; ``message`` says what is valid."""
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameCondition:
    """Values that replace those of the video from one frame on. None keeps the value of the frames before."""

    frame: int
    """First frame that has these values."""
    prompt: str | None = None
    """Text that the frames show; an empty one is no text."""
    class_label: int | None = None
    """Class index."""
    guidance_scale: float | None = None
    """Strength of classifier-free guidance."""

    def changes(self) -> dict[str, Any]:
        """The values that are given, by name."""
        values = {name: getattr(self, name) for name in CONDITION_FIELDS}
        return {name: value for name, value in values.items() if value is not None}


CONDITION_FIELDS = tuple(f.name for f in fields(FrameCondition) if f.name != "frame")
"""What can change within a video."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Parameters of one video. Equal parameters and equal weights give equal frames."""

    num_frames: int = field(default=16, metadata={"tag": "f"})
    """Frames of the video, given ones included. It may be longer than the model sees at once."""
    num_inference_steps: int | None = field(default=None, metadata={"tag": "s", "usual": 50})
    """Sampling steps per frame, S in the paper. None is the model's default: 50, unless its configuration says
    otherwise, or the number that a student was distilled for."""
    solver: Solver | None = field(default=None, metadata={"tag": "", "usual": "ddim"})
    """How a frame gets from one sampling step to the next. ddim: first order. dpmpp_2m: DPM-Solver++(2M), second order,
    for few steps. unipc: dpmpp_2m with a corrector. lcm: predicts the clean frame and adds new noise, for students. All
    evaluate the model once per step. None is ddim, for a student lcm."""
    timestep_spacing: TimestepSpacing | None = field(default=None, metadata={"tag": ""})
    """The timesteps of the sampling steps. leading: even, ending at 1. trailing: even, starting at the last training
    timestep. log_snr: even in the logarithm of the signal-to-noise ratio. distilled: those of a student. None is
    leading for ddim, distilled for lcm and log_snr for the other solvers."""
    ar_step: int | None = field(default=None, metadata={"tag": "ar"})
    """Difference of timesteps between neighbouring frames, in sampling steps: 0 denoises all frames together,
    num_inference_steps one frame after another. None is the model's default: 5, unless its configuration says
    otherwise, or the nearest valid value; for a student num_inference_steps."""
    guidance_scale: float = field(default=1.0, metadata={"tag": "g"})
    """Strength of classifier-free guidance; 1 turns it off and halves the cost."""
    mode: SamplingMode = field(default="window", metadata={"tag": "mode-"})
    """What a frame of a long video sees. window: the last frames, as many as the model was trained on. rolling: the
    cached keys and values of earlier frames; needs a model trained with dit.attention_window. full: the result of
    window without any cache, slowly."""
    sink_frames: int = field(default=0, metadata={"tag": "sink"})
    """First frames that every window of a long video holds, in the places of its first ones (attention sink). For
    mode=window and mode=full."""
    window_stride: int = field(default=1, metadata={"tag": "stride"})
    """Frames by which the window of a long video moves at once. More than 1 saves evaluations; a frame then sees
    between stride and one frame less than the window before it. For mode=window and mode=full."""
    class_label: int | None = field(default=None, metadata={"per_video": True, "tag": "class-"})
    """Class index. None generates without a class; `ardiff generate` then takes the classes in turn."""
    prompt: str | None = field(default=None, metadata={"per_video": True, "tag": "prompt-", "hash": True})
    """Text that the video shows, for models trained with text. None or an empty one generates without text."""
    negative_prompt: str | None = field(default=None, metadata={"per_video": True, "tag": "negative-", "hash": True})
    """Text that guidance leads away from. None leads away from no text."""
    conditions: tuple[FrameCondition, ...] = field(
        default=(), metadata={"per_video": True, "tag": "conditions-", "hash": True}
    )
    """Changes of the condition within the video, for example [{frame: 64, prompt: a red ring}]: from that frame on,
    prompt, class_label and guidance_scale are replaced by those given."""
    seed: int = field(default=0, metadata={"per_video": True, "tag": "seed-"})
    """Seed of the noise. `ardiff generate` counts up from it."""
    size: str | None = field(default=None, metadata={"tag": ""})
    """WIDTHxHEIGHT of the frames in pixels, one of the sizes that the model knows. None is its first one."""
    given_frames: int = field(default=0, metadata={"from_input": True, "tag": "given-"})
    """First frames that are given by the caller instead of generated."""

    @property
    def params(self) -> SamplingParams:
        """The sampling parameters alone, without the fields that a subclass adds."""
        return SamplingParams(**{f.name: getattr(self, f.name) for f in fields(SamplingParams)})

    def shared(self) -> SamplingParams:
        """The parameters without those of a single video. Videos whose shared parameters are equal can be one batch."""
        defaults: dict[str, Any] = {f.name: f.default for f in fields(SamplingParams) if f.name in PER_VIDEO}
        return replace(self, **defaults)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """The inverse of :func:`dataclasses.asdict`, also after a round trip through JSON."""
        return cls(**{**values, "conditions": as_conditions(values.get("conditions", ()))})

    def changed(self) -> dict[str, Any]:
        """Fields that differ from their default, by name.

        Names and fingerprints of videos leave defaults out, so that a new field changes none of them. For the same
        reason the default of an existing field must never change, nor what None usually stands for.
        """
        values = {f.name: (getattr(self, f.name), f) for f in fields(SamplingParams)}
        return {n: value for n, (value, f) in values.items() if value not in (f.default, f.metadata.get("usual"))}

    def tags(self) -> list[str]:
        """Short text for each changed field, such as ``ar5``, for names of files; of texts a hash."""
        metadata = {f.name: f.metadata for f in fields(SamplingParams)}
        tags = []
        for name, value in self.changed().items():
            text = f"{value:g}" if isinstance(value, float) else str(value)
            text = fingerprint(value)[:8] if metadata[name].get("hash") else text
            tags.append(f"{metadata[name].get('tag', f'{name}-')}{text}")
        return tags

    @property
    def guided(self) -> bool:
        """Whether the model is also evaluated without its condition, for classifier-free guidance of any frame."""
        changes = (change.guidance_scale for change in self.conditions)
        return self.guidance_scale != 1.0 or any(scale not in (None, 1.0) for scale in changes)

    def condition_of(self, frame: int) -> FrameCondition:
        """The condition of a frame, with all values: those of the video, replaced by its changes up to the frame."""
        values = {name: getattr(self, name) for name in CONDITION_FIELDS}
        for change in self.conditions:
            if change.frame <= frame:
                values |= change.changes()
        return FrameCondition(frame=frame, **values)

    def with_change(self, change: FrameCondition) -> SamplingParams:
        """The parameters with one more change, which may be at the frame of another one. Later changes stay."""
        at_frame = [other.changes() for other in self.conditions if other.frame == change.frame]
        merged = FrameCondition(frame=change.frame, **{**(at_frame[0] if at_frame else {}), **change.changes()})
        others = [other for other in self.conditions if other.frame != change.frame]
        return replace(self, conditions=tuple(sorted((*others, merged), key=lambda other: other.frame)))

    def without_past(self, frame: int) -> SamplingParams:
        """Parameters for the frames from ``frame`` on, with the changes up to it merged into one."""
        past = [change.frame for change in self.conditions if change.frame <= frame]
        if not past:
            return self
        merged = FrameCondition(frame=past[-1], **self.condition_of(frame).changes())
        return replace(self, conditions=(merged, *(c for c in self.conditions if c.frame > frame)))

    @property
    def texts(self) -> tuple[str, ...]:
        """All distinct texts of the video, to be encoded."""
        texts = (self.prompt, self.negative_prompt, *(change.prompt for change in self.conditions))
        return tuple(dict.fromkeys(text for text in texts if text))

    @property
    def resolved_timestep_spacing(self) -> TimestepSpacing:
        """``timestep_spacing``, or what None stands for. :func:`validate` leaves None, so that ids of earlier videos,
        which hold no spacing, stay valid."""
        usual: dict[Solver, TimestepSpacing] = {"ddim": "leading", "lcm": "distilled"}
        return self.timestep_spacing or usual.get(self.resolved_solver, "log_snr")

    @property
    def resolved_num_inference_steps(self) -> int:
        """``num_inference_steps`` of parameters that :func:`validate` has returned. Raises ValueError if it is None."""
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call validate(params, model) first, which fills it in")
        return self.num_inference_steps

    @property
    def resolved_solver(self) -> Solver:
        """``solver`` of parameters that :func:`validate` has returned. Raises ValueError if it is None."""
        if self.solver is None:
            raise ValueError("solver is None: call validate(params, model) first, which fills it in")
        return self.solver

    @property
    def resolved_ar_step(self) -> int:
        """``ar_step`` of parameters that :func:`validate` has returned. Raises ValueError if it is still None."""
        if self.ar_step is None:
            raise ValueError("ar_step is None: call validate(params, model) first, which fills it in")
        return self.ar_step


PER_VIDEO = tuple(f.name for f in fields(SamplingParams) if f.metadata.get("per_video"))
"""Fields that may differ between the videos of a batch."""
FROM_INPUT = tuple(f.name for f in fields(SamplingParams) if f.metadata.get("from_input"))
"""Fields that follow from another input of a call, such as given frames. They are not settings of a job."""


def as_conditions(values: Iterable[FrameCondition | Mapping[str, Any] | Sequence[Any]]) -> tuple[FrameCondition, ...]:
    """Changes of the condition from any of their forms: ``FrameCondition(frame=64, prompt="a ring")``,
    ``{"frame": 64, "prompt": "a ring"}``, ``(64, "a ring")`` or ``(64, {"prompt": "a ring"})``.

    Raises:
        InvalidParamError: A value has none of these forms.
    """
    conditions = []
    for value in values:
        try:
            if isinstance(value, FrameCondition):
                conditions.append(value)
            elif isinstance(value, Mapping):
                conditions.append(FrameCondition(**value))
            else:
                frame, change = value
                change = {"prompt": change} if isinstance(change, str) else change
                conditions.append(FrameCondition(frame=frame, **change))
        except (TypeError, ValueError) as error:
            names = ", ".join(f.name for f in fields(FrameCondition))
            raise InvalidParamError("conditions", f"{value!r} is no condition: give a mapping of {names}") from error
    return tuple(conditions)


def _is_condition(value: Any) -> bool:
    """Whether a value has one of the forms of :func:`as_conditions`, and is not a sequence of them."""
    pair = isinstance(value, Sequence) and len(value) == 2 and isinstance(value[0], int)
    return pair or isinstance(value, FrameCondition | Mapping)


def _values_of_videos(name: str, value: Any) -> list[Any] | None:
    """The value of each video, if ``value`` is a sequence of them; None if it is that of all videos."""
    if name == "conditions":
        items = list(value)
        of_videos = all(isinstance(i, Sequence) and not isinstance(i, str) and not _is_condition(i) for i in items)
        return [as_conditions(item) for item in items] if items and of_videos else None
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else None


def expand_params(
    params: SamplingParams | Sequence[SamplingParams] | None = None, **changes: Any
) -> list[SamplingParams]:
    """Parameters of each video of a batch.

    Args:
        params: Of one video, or of each; None is the defaults.
        changes: Values by field name, which replace those of ``params``. Fields of a single video, such as ``prompt``
            and ``seed``, may also be sequences with a value per video; a sequence of one value is used for all videos.
            ``conditions`` takes the forms of :func:`as_conditions`.

    Raises:
        TypeError: A name is not a field of :class:`SamplingParams`; names the nearest one.
        ValueError: Sequences of different lengths, or no video at all.
    """
    names = [f.name for f in fields(SamplingParams)]
    for name in changes:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid names: {', '.join(names)}"
            raise TypeError(f"unknown sampling parameter {name!r}: {hint}")
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()]
    columns: dict[str, list[Any]] = {"params": list(params)}
    for name in PER_VIDEO:
        if name in changes and (values := _values_of_videos(name, changes[name])) is not None:
            columns[name] = values
            del changes[name]
    if "conditions" in changes:
        changes["conditions"] = as_conditions(changes["conditions"])
    lengths = {name: len(values) for name, values in columns.items()}
    count = max(lengths.values())
    if set(lengths.values()) - {1, count} or 0 in lengths.values():
        sizes = ", ".join(f"{length} {name}" for name, length in lengths.items() if name != "params" or length != 1)
        raise ValueError(f"cannot pair {sizes}: give one value per video, or one for all")
    columns = {name: values * (count // len(values)) for name, values in columns.items()}
    bases = columns.pop("params")
    return [replace(bases[i], **changes, **{name: v[i] for name, v in columns.items()}) for i in range(count)]


UNKNOWN = Resolution(0, 0)
"""The resolution of a model of which only the AR-DiT is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """What a model can sample, without its weights. The fields are named as in its configuration."""

    num_frames: int
    """Frames that the model sees at once."""
    num_classes: int
    num_timesteps: int
    """Training timesteps, T in the paper."""
    shapes: tuple[Resolution, ...] = (UNKNOWN,)
    """Heights and widths of frames in pixels; the first is the default."""
    class_names: tuple[str, ...] = ()
    causal: bool = True
    """Whether no frame sees a later one."""
    attention_window: int | None = None
    positions: str = "rotary"
    condition: str = "modulation"
    condition_tokens: int = 0
    student: Student | None = None
    """What the model was distilled for; None if it is no student."""
    sampling_defaults: SamplingDefaults | None = None
    """What the model's videos are sampled with where a request says nothing; None is the usual values."""

    @classmethod
    def from_configs(
        cls, dit: Any, diffusion: Any, shapes: Sequence[Resolution] = (UNKNOWN,), class_names: Sequence[str] = ()
    ) -> ModelInfo:
        """Reads a ``DiTConfig`` and a ``DiffusionConfig``."""
        return cls(
            num_frames=dit.num_frames,
            num_classes=dit.num_classes,
            num_timesteps=diffusion.num_timesteps,
            shapes=tuple(shapes),
            class_names=tuple(class_names),
            causal=dit.causal,
            attention_window=dit.attention_window,
            positions=dit.positions,
            condition=dit.condition,
            condition_tokens=dit.condition_tokens,
            student=diffusion.student,
            sampling_defaults=diffusion.sampling_defaults,
        )

    @property
    def resolution(self) -> Resolution:
        """Height and width of a frame in pixels without ``size``."""
        return self.shapes[0]

    def shape_index(self, params: SamplingParams) -> int:
        """The index of the shape of a video's frames. Raises InvalidParamError if the model does not know its size."""
        if params.size is None:
            return 0
        sizes = [shape.size for shape in self.shapes]
        if params.size not in sizes:
            known = ", ".join(sizes[:-1]) + " or " * (len(sizes) > 1) + sizes[-1]
            raise InvalidParamError("size", f"size is {str(params.size)[:32]}: the model makes {known} only")
        return sizes.index(params.size)

    def shape_of(self, params: SamplingParams) -> Resolution:
        """Height and width of a video's frames. Raises InvalidParamError if the model does not know its size."""
        return self.shapes[self.shape_index(params)]

    @property
    def text(self) -> bool:
        """Whether the model takes prompts."""
        return self.condition == "cross_attention"

    @property
    def max_steps(self) -> int:
        """The largest ``num_inference_steps``."""
        return self.num_timesteps if self.student is None else len(self.student.timesteps)

    @property
    def modes(self) -> tuple[SamplingMode, ...]:
        """The sampling modes of videos longer than ``num_frames``."""
        return tuple(mode for mode in get_args(SamplingMode) if self.mode_error(mode, self.num_frames + 1) is None)

    def mode_error(self, mode: SamplingMode, num_frames: int) -> str | None:
        """Why the model cannot sample a video of ``num_frames`` in this mode, and what to do; None if it can."""
        if mode == "full":
            return None
        if (reason := self._cache_error()) is not None:
            return f"{reason}: sample it with mode=full"
        if mode == "rolling" and num_frames > self.num_frames:
            if self.attention_window is None:
                return "mode=rolling needs a model trained with dit.attention_window (the band mask)"
            if self.positions != "rotary":
                return "mode=rolling needs shift-invariant positions: dit.positions must be rotary"
        return None

    def _cache_error(self) -> str | None:
        """Why keys and values of finished frames of this model cannot be cached; None if they can."""
        if not self.causal:
            return (
                "mode=window and mode=rolling cache finished frames, which is exact only if no frame sees a later one, "
                "but frames of this model do (dit.attention=bidirectional or dit.condition_attention=all)"
            )
        if self.condition == "tokens" and not self.condition_tokens:
            return (
                "mode=window and mode=rolling take the condition tokens of a class, but this model has none "
                "(dit.condition_tokens=0)"
            )
        return None

    def text_error(self, params: SamplingParams) -> tuple[str, str] | None:
        """The parameter whose text the model cannot use, and what to do; None without such a parameter."""
        if params.texts and not self.text:
            param = "prompt" if params.prompt else "negative_prompt" if params.negative_prompt else "conditions"
            return param, f"the model takes no text: leave {param} out, or use a model trained with text"
        if (wrong := next((text for text in params.texts if not isinstance(text, str)), None)) is not None:
            return "prompt", f"a prompt must be text, got {wrong!r}"
        if params.negative_prompt and not params.guided and self.student is None:
            return "negative_prompt", "negative_prompt acts through guidance only: set guidance_scale above 1"
        changes = max((change.prompt or "" for change in params.conditions), key=len, default="")
        texts = {"prompt": params.prompt, "negative_prompt": params.negative_prompt, "conditions": changes}
        for param, text in texts.items():
            if (length := len(text or "")) > MAX_PROMPT_LENGTH:
                return param, f"a prompt may have at most {MAX_PROMPT_LENGTH} characters, got {length}: shorten it"
        return None

    def conditions_error(self, params: SamplingParams) -> str | None:
        """Why the changes within the video are not valid, and what is; None if they are."""
        frames = [change.frame for change in params.conditions]
        if any(not isinstance(frame, int) or not 0 <= frame < params.num_frames for frame in frames):
            return f"the frames of conditions must be between 0 and {params.num_frames - 1}"
        if any(a >= b for a, b in itertools.pairwise(frames)):
            return "the frames of conditions must increase"
        for change in params.conditions:
            if not change.changes():
                return f"frame {change.frame} changes nothing: give it prompt, class_label or guidance_scale"
            if change.guidance_scale is not None and not 0 <= change.guidance_scale < float("inf"):
                return "guidance_scale must be a finite number of at least 0"
            if change.class_label is not None and self.condition == "tokens":
                return "the condition tokens of this model hold for the whole video: give class_label for the video"
            if change.class_label is not None and not 0 <= change.class_label < self.num_classes:
                return f"class_label {change.class_label} is out of range: the model {self.valid_classes}"
        return None

    @property
    def valid_classes(self) -> str:
        """The classes as the end of a sentence that begins with "the model"."""
        if not self.num_classes:
            return "has no classes"
        names = f" ({', '.join(self.class_names[:50])})" if self.class_names else ""
        return f"has classes 0..{self.num_classes - 1}{names}"

    def class_name(self, class_label: int | None) -> str:
        """The name of a class, or ``class N``; empty without a class."""
        if class_label is None:
            return ""
        names = self.class_names
        return names[class_label] if class_label < len(names) else f"class {class_label}"

    def smallest_ar_step(self, params: SamplingParams) -> int:
        """The smallest valid ``ar_step`` for the other parameters."""
        steps, window = params.resolved_num_inference_steps, self._window(params)
        return smallest_ar_step(params.num_frames, steps, window, params.sink_frames, params.window_stride)

    def sink_error(self, params: SamplingParams) -> str | None:
        """Why the model cannot sample with these ``sink_frames``, and what is valid; None if it can."""
        if not 0 <= params.sink_frames < self.num_frames:
            most = self.num_frames - 1
            return f"sink_frames must be between 0 and {most}, because the window has {self.num_frames} frames"
        if params.sink_frames and params.mode == "rolling":
            return "sink_frames needs a window: sample with mode=window or mode=full, or with sink_frames=0"
        if params.sink_frames and self.attention_window is not None and self.attention_window < self.num_frames:
            return (
                f"sink_frames must be 0 for this model: its last frames do not see the first ones of the window "
                f"(dit.attention_window={self.attention_window}, dit.num_frames={self.num_frames})"
            )
        return None

    def stride_error(self, params: SamplingParams) -> str | None:
        """Why ``window_stride`` is not valid for the other parameters; None if it is."""
        most = self.num_frames - params.sink_frames
        if not 1 <= params.window_stride <= most:
            return f"window_stride must be between 1 and {most}, the frames of the window that move"
        if params.window_stride > 1 and params.mode == "rolling":
            return "window_stride needs a window: sample with mode=window or mode=full, or with window_stride=1"
        return None

    def with_defaults(self, params: SamplingParams) -> SamplingParams:
        """The parameters with number of steps, solver and ``ar_step`` filled in where they are None."""
        usual = {f.name: f.metadata["usual"] for f in fields(SamplingParams) if "usual" in f.metadata}
        own = self.sampling_defaults
        if own is not None:
            usual["num_inference_steps"] = own.num_inference_steps
        if self.student is not None:
            usual = {"num_inference_steps": self.student.num_steps, "solver": "lcm"}
        params = replace(params, **{name: value for name, value in usual.items() if getattr(params, name) is None})
        if params.ar_step is None:
            steps = params.resolved_num_inference_steps
            wanted = DEFAULT_AR_STEP if own is None else own.ar_step_of(steps)
            ar_step = min(max(wanted, self.smallest_ar_step(params)), steps)
            params = replace(params, ar_step=ar_step if self.student is None else steps)
        return params

    def student_error(self, params: SamplingParams) -> tuple[str, str] | None:
        """The parameter for which a student was not made, or which only students have, and what is valid; None if the
        parameters, which are complete, suit the model."""
        student, steps = self.student, params.resolved_num_inference_steps
        spacing = params.resolved_timestep_spacing
        if student is None:
            for name, value, only in (("solver", params.solver, "lcm"), ("timestep_spacing", spacing, "distilled")):
                if value == only:
                    return name, f"{name}={only} is for students, which `ardiff distill` makes, and the model is none"
            return None
        count = self.max_steps
        known = f"the model is a student of {f'1 to {count} steps' if count > 1 else 'one step'}"
        learnt = f"{known}, which has learnt guidance of {student.guidance:g}"
        wrong = {
            "num_inference_steps": (
                not 1 <= steps <= count,
                f"{known}: leave num_inference_steps out, which is {student.num_steps}, or lower it; got {steps}",
            ),
            "solver": (params.solver != "lcm", f"{known}: leave solver out, which is lcm; got {params.solver}"),
            "timestep_spacing": (spacing != "distilled", f"{known}: leave timestep_spacing out; got {spacing}"),
            "ar_step": (
                params.ar_step != steps,
                f"{known} that has only seen clean frames before a frame: leave ar_step out, which is the number of "
                f"steps, {steps}; got {params.ar_step}",
            ),
            "guidance_scale": (params.guided, f"{learnt}: leave guidance_scale at 1"),
            "negative_prompt": (bool(params.negative_prompt), f"{learnt}: it takes no negative_prompt"),
        }
        return next(((name, message) for name, (is_wrong, message) in wrong.items() if is_wrong), None)

    def _window(self, params: SamplingParams) -> int | None:
        """Frames of the moving window; None where a frame sees all earlier ones."""
        return None if params.mode == "rolling" else self.num_frames


def validate(params: SamplingParams, model: ModelInfo) -> SamplingParams:
    """Checks parameters against a model, before anything is computed.

    Returns:
        The parameters with number of steps, solver and ``ar_step`` filled in.

    Raises:
        InvalidParamError: A parameter is out of range, or the model cannot do what it asks for.
    """

    def require(condition: bool, param: str, message: str) -> None:
        if not condition:
            raise InvalidParamError(param, message)

    require(params.num_frames >= 1, "num_frames", f"num_frames must be at least 1, got {params.num_frames}")
    steps = params.num_inference_steps
    require(
        steps is None or 1 <= steps <= model.num_timesteps,
        "num_inference_steps",
        f"num_inference_steps must be between 1 and {model.num_timesteps}, got {steps}",
    )
    require(
        0 <= params.guidance_scale < float("inf"),
        "guidance_scale",
        f"guidance_scale must be a finite number of at least 0, got {params.guidance_scale}",
    )
    if model.resolution != UNKNOWN:
        model.shape_index(params)
    choices = {"solver": (Solver, None), "timestep_spacing": (TimestepSpacing, None), "mode": (SamplingMode,)}
    for name, (choice, *unset) in choices.items():
        value, valid = getattr(params, name), get_args(choice)
        require(value in (*valid, *unset), name, f"{name} must be one of {', '.join(valid)}, got {value!r}")
    if (reason := model.mode_error(params.mode, params.num_frames)) is not None:
        raise InvalidParamError("mode", reason)
    if (reason := model.sink_error(params)) is not None:
        raise InvalidParamError("sink_frames", f"{reason}; got {params.sink_frames}")
    if (reason := model.stride_error(params)) is not None:
        raise InvalidParamError("window_stride", f"{reason}; got {params.window_stride}")
    if params.class_label is not None:
        require(
            0 <= params.class_label < model.num_classes,
            "class_label",
            f"class_label {params.class_label} is out of range: the model {model.valid_classes}",
        )
    if (invalid := model.text_error(params)) is not None:
        raise InvalidParamError(*invalid)
    if (reason := model.conditions_error(params)) is not None:
        raise InvalidParamError("conditions", reason)
    require(
        0 <= params.given_frames < params.num_frames,
        "given_frames",
        f"{params.given_frames} given frames leave nothing to generate of {params.num_frames}",
    )
    params = model.with_defaults(params)
    if (wrong := model.student_error(params)) is not None:
        raise InvalidParamError(*wrong)
    try:
        steps, window, sink_frames = params.resolved_num_inference_steps, model._window(params), params.sink_frames
        check_ar_step(params.num_frames, steps, params.resolved_ar_step, window, sink_frames, params.window_stride)
    except ValueError as error:
        raise InvalidParamError("ar_step", str(error)) from error
    return params
