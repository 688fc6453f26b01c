"""The sampling engine: many requests, one packed model pass per iteration, each frame evaluated only while it moves.

For F frames and S sampling steps a request costs ``F S + F - 1`` frame evaluations whatever its ``ar_step``, more where
a window moves (:mod:`ardiff.sampling.cost`): a frame that has not started cannot influence an earlier one and is not
evaluated; a finished frame never changes again, and one evaluation at the clean timestep (its fill) leaves keys and
values that all later frames use.

Shapes: B videos of a request, F frames evaluated in an iteration, L tokens, D latent width, S sampling steps, N frames
of all requests packed.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ardiff import onednn
from ardiff.diffusion.ad import inference_timesteps
from ardiff.diffusion.ar_step import check_ar_step
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.guidance import guide
from ardiff.diffusion.noise import ddim_coefficients
from ardiff.diffusion.prediction import predicted_x0
from ardiff.diffusion.sampler import frame_noise
from ardiff.dit import DiT, DiTConfig
from ardiff.errors import ArdiffError
from ardiff.layers import Attend
from ardiff.sampling.cache import AttentionMode, FrameCache
from ardiff.sampling.network import Execution, network

CachedExecutor = Literal["window", "rolling"]

MAX_IDLE_TABLES = 16
"""Tables of modulations, one for each number of steps and label, that an engine keeps for requests to come."""


class EngineLimitError(ArdiffError):
    """A request asks for more than the engine's limits allow, or the engine has no place for it now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How much the engine takes on, and how it computes. A request beyond the limits is refused before any work."""

    max_requests: int = 64
    """Requests in work at the same time; further ones wait."""
    max_waiting: int = 256
    """Requests that may wait."""
    max_frames: int = 4096
    """Frames of a request, times its videos."""
    max_cache_bytes: int = 8 * 2**30
    """Keys and values of all requests in work, and the modulations of their timesteps."""
    attention: Literal["auto", "ragged", "masked", "flex"] = "auto"
    """``ragged``: a call per frame, without masks; ``masked``: one call with a block-causal mask; ``flex``: one call of
    FlexAttention. ``auto`` is ragged on CPUs for frames of 16 tokens and more, masked otherwise."""
    execution: Literal["auto", "plain", "packed", "compiled"] = "auto"
    """``packed``: a second copy of the weights in the layout that a CPU multiplies fastest; ``compiled``: the blocks
    through torch.compile; ``plain``: neither. ``auto`` is packed on CPUs and plain elsewhere."""

    def __post_init__(self) -> None:
        if min(self.max_requests, self.max_frames, self.max_cache_bytes) < 1 or self.max_waiting < 0:
            raise ValueError("max_requests, max_frames and max_cache_bytes must be at least 1, max_waiting at least 0")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleRequest:
    """Videos that share every setting but label and seed."""

    class_labels: tuple[int, ...]
    """One per video; the model's null class for none."""
    seeds: tuple[int, ...]
    """One per video."""
    num_frames: int
    """Frames of each video, given ones included."""
    ar_step: int
    """The paper's timestep difference."""
    num_inference_steps: int
    """S."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 evaluates one branch only."""
    executor: CachedExecutor = "window"
    """What a frame sees in a video longer than the model: ``window``: a clip of its own that moves along, as the
    released sampler has it; ``rolling``: the keys and values of the frames before, each computed once."""
    condition: Tensor | None = None
    """Clean latents of the first frames, ``(B, C, L, D)``; they are not generated but seen."""


@dataclass(frozen=True, slots=True)
class FinishedFrames:
    """What an iteration finished of a request."""

    request_id: int
    first_frame: int
    """Index of the first of the frames."""
    latents: Tensor
    """Clean latents ``(B, frames, L, D)``."""
    done: bool
    """The request is complete with these."""


def why_not_cached(config: DiTConfig) -> str | None:
    """Why the fast executors cannot sample a model of this configuration, and what can; None if they can."""
    if not config.causal:
        return (
            "the fast executors cache finished frames, which is exact only if no frame sees a later one, but frames of "
            "this model do (dit.attention=bidirectional or dit.condition_attention=all): sample it with executor=full"
        )
    if config.condition == "tokens":
        return (
            "the fast executors know classes as modulations only, but this model has condition tokens before its "
            "frames (dit.condition=tokens): sample it with executor=full"
        )
    return None


class SamplingEngine:
    """Runs requests together. Plain synchronous code: call :meth:`step` until :attr:`busy` is false.

    A request's result does not depend on what runs beside it, up to the rounding of the packed matrix products.
    """

    def __init__(
        self,
        model: DiT,
        diffusion: DiffusionConfig,
        config: EngineConfig | None = None,
    ) -> None:
        """``model`` is in evaluation mode, on its device; ``diffusion`` is what it was trained with."""
        self.model, self.diffusion = model, diffusion
        self.config = config or EngineConfig()
        self.device = next(model.parameters()).device
        self.weights_dtype = next(model.parameters()).dtype
        # Latents between iterations stay exact when the weights are bfloat16.
        self.dtype = torch.float64 if self.weights_dtype == torch.float64 else torch.float32
        many_tokens = model.config.num_tokens >= 16
        self.attention: AttentionMode = "ragged" if self.device.type == "cpu" and many_tokens else "masked"
        if self.config.attention != "auto":
            self.attention = self.config.attention
        execution: Execution = "packed" if onednn.packable(model) else "plain"
        self._network = network(model, execution if self.config.execution == "auto" else self.config.execution)
        self.alphas_cumprod = diffusion.alphas_cumprod().to(self.device)
        self.frame_evaluations = 0
        self._ids = itertools.count()
        self._waiting: deque[tuple[int, SampleRequest]] = deque()
        self._lanes: dict[int, _Lane] = {}
        self._tables: dict[tuple[int, int], Tensor] = {}

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self._lanes)

    @property
    def in_work(self) -> set[int]:
        """Ids of the requests that take part in iterations; the others wait for room."""
        return set(self._lanes)

    def submit(self, request: SampleRequest) -> int:
        """Accepts a request, which starts with the next iteration that has room for it; returns its id.

        Raises:
            ValueError: A setting is out of range, or the model cannot do what is asked; says what is valid.
            EngineLimitError: The request is beyond the limits, or too many wait already.
        """
        self.check(request)
        if len(self._waiting) >= self.config.max_waiting + self.config.max_requests - len(self._lanes):
            raise EngineLimitError(f"{len(self._waiting)} requests wait already, which is the limit: try again later.")
        request_id = next(self._ids)
        self._waiting.append((request_id, request))
        return request_id

    def cancel(self, request_id: int) -> bool:
        """Drops a request and frees its memory; False if it is neither waiting nor in work."""
        before = len(self._waiting)
        self._waiting = deque(item for item in self._waiting if item[0] != request_id)
        return self._lanes.pop(request_id, None) is not None or len(self._waiting) < before

    def step(self) -> list[FinishedFrames]:
        """One iteration of every request in work, in one pass of the model; returns the frames that are final now."""
        with torch.inference_mode():
            finished = self._iterate()
        # Copies made out here are ordinary tensors, which the caller may change or differentiate.
        return [replace(frames, latents=frames.latents.clone()) for frames in finished]

    def _iterate(self) -> list[FinishedFrames]:
        self._admit()
        lanes = list(self._lanes.values())
        if not lanes:
            return []
        spans = [lane.advance() for lane in lanes]
        outputs = self._evaluate(lanes, spans)
        finished = []
        for lane, span, output in zip(lanes, spans, outputs, strict=True):
            self.frame_evaluations += (span.end - span.start) * lane.videos
            finished += lane.update(span, output)
            if lane.done:
                del self._lanes[lane.request_id]
        return finished

    def run(self, request: SampleRequest, on_frames: Callable[[int], None] = lambda final_frames: None) -> Tensor:
        """Submits one request to an idle engine and returns all its frames, ``(B, F, L, D)``."""
        request_id = self.submit(request)
        parts: list[Tensor] = []
        while self.busy:
            for event in self.step():
                assert event.request_id == request_id
                parts.append(event.latents)
                on_frames(event.first_frame + event.latents.shape[1])
        given = [] if request.condition is None else [request.condition.to(self.device, self.dtype)]
        return torch.cat([*given, *parts], dim=1)

    def check(self, request: SampleRequest) -> None:
        """Raises what :meth:`submit` would raise for the request, short of too many that wait."""
        if request.executor not in get_args(CachedExecutor):
            raise ValueError(f"executor must be one of {', '.join(get_args(CachedExecutor))}, got {request.executor!r}")
        config, videos = self.model.config, len(request.seeds)
        if (reason := why_not_cached(config)) is not None:
            raise ValueError(reason)
        given = 0 if request.condition is None else request.condition.shape[1]
        if not videos or len(request.class_labels) != videos:
            raise ValueError(
                f"{len(request.class_labels)} class labels and {videos} seeds: there must be one of each a video"
            )
        if any(not 0 <= label <= config.num_classes for label in request.class_labels):
            raise ValueError(f"class labels must be in 0..{config.num_classes}, got {request.class_labels}")
        shape = (videos, given, config.num_tokens, config.token_dim)
        if request.condition is not None and tuple(request.condition.shape) != shape:
            raise ValueError(f"condition must be {shape}, got {tuple(request.condition.shape)}")
        if request.condition is not None and not 1 <= given < request.num_frames:
            raise ValueError(f"{given} given frames leave nothing to generate of {request.num_frames}")
        window = config.num_frames if request.executor == "window" else None
        if window is None and request.num_frames > config.num_frames:
            if config.attention_window is None:
                raise ValueError("the rolling executor needs a model trained with dit.attention_window (the band mask)")
            if config.positions != "rotary":
                raise ValueError("the rolling executor needs shift-invariant positions: dit.positions must be rotary")
        check_ar_step(request.num_frames, request.num_inference_steps, request.ar_step, window)
        inference_timesteps(self.diffusion.num_timesteps, request.num_inference_steps)
        if request.num_frames * videos > self.config.max_frames:
            raise EngineLimitError(
                f"{videos} x {request.num_frames} frames are beyond the limit of {self.config.max_frames} frames."
            )
        if (needed := self._bytes([request])) > self.config.max_cache_bytes:
            raise EngineLimitError(
                f"The request needs {needed / 2**20:.0f} MiB for keys, values and modulations, the limit is "
                f"{self.config.max_cache_bytes / 2**20:.0f} MiB: ask for fewer videos at once, or a larger ar_step."
            )

    def _bytes(self, requests: Iterable[SampleRequest]) -> int:
        """Memory that requests take together: keys and values of each, and the tables, which they share."""
        requests = list(requests)
        caches = (
            FrameCache.num_bytes(self.model.config, _sequences(r), _room(r, self.model), self.weights_dtype)
            for r in requests
        )
        return sum(caches) + self._table_bytes(self._tables_of(requests))

    def _table_bytes(self, tables: Iterable[tuple[int, int]]) -> int:
        rows = sum(num_steps for num_steps, _ in tables)
        return rows * self.model.modulation_width * self.weights_dtype.itemsize

    def _tables_of(self, requests: Iterable[SampleRequest]) -> set[tuple[int, int]]:
        return {(request.num_inference_steps, label) for request in requests for label in self.branches(request)}

    def branches(self, request: SampleRequest) -> list[int]:
        """The label of each sequence that a request evaluates: of each video, and without a class for guidance."""
        guided = request.guidance_scale != 1.0
        return [*request.class_labels] + [self.model.null_class] * (len(request.seeds) if guided else 0)

    def _admit(self) -> None:
        in_work = [lane.request for lane in self._lanes.values()]
        while self._waiting and len(in_work) < self.config.max_requests:
            request_id, request = self._waiting[0]
            in_work.append(request)
            if self._bytes(in_work) > self.config.max_cache_bytes:
                return
            self._waiting.popleft()
            self._keep_tables(in_work)
            self._lanes[request_id] = _Lane(request_id, request, self)

    def _keep_tables(self, in_work: list[SampleRequest]) -> None:
        """Drops tables that nobody uses now, where there are many, or no room for them."""
        needed = self._tables_of(in_work)
        idle = [key for key in self._tables if key not in needed]
        spare = self.config.max_cache_bytes - self._bytes(in_work)
        while idle and (len(idle) > MAX_IDLE_TABLES or self._table_bytes(idle) > spare):
            del self._tables[idle.pop(0)]

    def _evaluate(self, lanes: list[_Lane], spans: list[_Span]) -> list[Tensor]:
        """Predicted clean latents of every lane's moving frames, ``(F, B, L, D)`` each."""
        modulations = torch.cat([lane.modulations(span) for lane, span in zip(lanes, spans, strict=True)])
        inputs = torch.cat([lane.inputs(span) for lane, span in zip(lanes, spans, strict=True)])
        positions = torch.cat([lane.positions(span) for lane, span in zip(lanes, spans, strict=True)])
        sizes = [(span.end - span.start) * lane.sequences for lane, span in zip(lanes, spans, strict=True)]
        places = [lane.cache.places(span.start, span.end) for lane, span in zip(lanes, spans, strict=True)]

        def layer_attention(layer: int) -> Attend:
            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), lanes, places, strict=True)
                mixed = [lane.cache.attend(layer, q1, k1, v1, where) for q1, k1, v1, lane, where in parts]
                return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

            return attend

        attention = [layer_attention(layer) for layer in range(self.model.config.depth)]
        output = self._network.forward_frames(inputs.to(self.weights_dtype), modulations, positions, attention)
        return [
            lane.predict(span, part)
            for lane, span, part in zip(lanes, spans, output.to(self.dtype).split(sizes), strict=True)
        ]

    def _modulations(self, num_inference_steps: int, class_label: int) -> Tensor:
        """The model's modulations at each timestep of a template, ``(S, M)``: they depend on no latent."""
        key = num_inference_steps, class_label
        if key not in self._tables:
            timesteps = inference_timesteps(self.diffusion.num_timesteps, num_inference_steps).to(self.device)
            self._tables[key] = self.model.modulations(timesteps, torch.full_like(timesteps, class_label))
        return self._tables[key]


@dataclass(frozen=True, slots=True)
class _Span:
    """The frames ``start .. end - 1`` that an iteration evaluates; those before ``moving`` are clean, only stored."""

    start: int
    moving: int
    end: int
    steps: Tensor
    """int64 ``(end - start,)`` on the engine's device: the template step at which each frame is evaluated."""


class _Lane:
    """A request in work: its latents, its cache, and where in the schedule it is.

    After iteration n frame f has made ``clamp(n - (f - given) s, 0, S)`` steps (see :mod:`ardiff.diffusion.ad`).
    """

    def __init__(self, request_id: int, request: SampleRequest, engine: SamplingEngine) -> None:
        self.request_id, self.request, self.engine = request_id, request, engine
        config = engine.model.config
        self.videos = len(request.seeds)
        self.sequences = _sequences(request)
        self.given = _given(request)
        self.window = _window(request, config.num_frames)
        self.iteration = 0
        self.stored = 0  # frames before this one are clean, and their keys and values are in the cache
        self.frames: dict[int, Tensor] = {}  # latents (B, L, D) of the frames that are still needed
        if request.condition is not None:
            condition = request.condition.to(engine.device, engine.dtype)
            self.frames = {f: condition[:, f] for f in range(self.given)}
        self.cache = FrameCache(
            config, self.sequences, _room(request, engine.model), engine.attention, engine.weights_dtype, engine.device
        )
        timesteps = inference_timesteps(engine.diffusion.num_timesteps, request.num_inference_steps)
        self.timesteps = timesteps.to(engine.device)
        factors = ddim_coefficients(timesteps, engine.diffusion.alphas_cumprod())
        self.x_factor, self.x0_factor = (f.to(engine.device, engine.dtype) for f in factors)
        branches = engine.branches(request)
        labels = list(dict.fromkeys(branches))
        self.tables = [engine._modulations(request.num_inference_steps, label) for label in labels]  # (S, M) each
        self.branch = torch.tensor([labels.index(label) for label in branches], device=engine.device)  # (B or 2 B,)

    @property
    def done(self) -> bool:
        """Whether every frame has made all its steps."""
        return self._finished(self.iteration) == self.request.num_frames

    def advance(self) -> _Span:
        """Starts the next iteration: draws the noise of frames that start, and says what is to be evaluated."""
        request, self.iteration = self.request, self.iteration + 1
        moving, end = self._finished(self.iteration - 1), self._started(self.iteration)
        for frame in range(max(self._started(self.iteration - 1), self.given), end):
            draws = [frame_noise(seed, frame, *self._frame_shape) for seed in request.seeds]
            noise = torch.stack(draws).to(self.engine.dtype)
            if self.engine.device.type == "cuda":
                noise = noise.pin_memory()  # so that the copy does not wait for what the device has in work
            self.frames[frame] = noise.to(self.engine.device, non_blocking=True)
        if self.window is not None:
            first = max(0, end - self.window)
            if first > self.cache.base:  # the window moved: what a frame sees has changed, so nothing stored holds
                self.cache.restart(first)
                self.stored = first
                self.frames = {f: x for f, x in self.frames.items() if f >= first}
        else:
            band = self.engine.model.config.attention_window or end
            self.cache.make_room(max(0, self.stored - band + 1), end)
        # Counted on the device, so that an iteration waits for nothing that the device has not done yet.
        frames = torch.arange(self.stored, end, device=self.engine.device)
        steps = (self.iteration - 1 - (frames - self.given) * request.ar_step).clamp(0, request.num_inference_steps - 1)
        steps = torch.where(frames < self.given, request.num_inference_steps - 1, steps)
        return _Span(self.stored, moving, end, steps)

    def inputs(self, span: _Span) -> Tensor:
        """Latents of the evaluated frames, once per branch of guidance, ``(F B, L, D)`` frame by frame."""
        latents = torch.stack([self.frames[f] for f in range(span.start, span.end)])  # (F, B, L, D)
        if self.sequences > self.videos:
            latents = latents.repeat(1, 2, 1, 1)
        return latents.flatten(0, 1)

    def modulations(self, span: _Span) -> Tensor:
        """Rows of the tables for the evaluated frames, ``(F B, M)``."""
        rows = torch.stack([table[span.steps] for table in self.tables], dim=1)  # (F, labels, M)
        return rows[:, self.branch].flatten(0, 1)

    def positions(self, span: _Span) -> Tensor:
        """Frame positions as the model sees them, ``(F B,)``: within the window, or in the whole video."""
        origin = 0 if self.window is None else self.cache.base
        frames = torch.arange(span.start - origin, span.end - origin, device=self.engine.device)
        return frames.repeat_interleave(self.sequences)

    def predict(self, span: _Span, output: Tensor) -> Tensor:
        """Guided clean latents of the moving frames, ``(F, B, L, D)``, from the model's output ``(F B, L, D)``."""
        engine = self.engine
        output = output.unflatten(0, (span.end - span.start, self.sequences))[span.moving - span.start :]
        latents = torch.stack([self.frames[f] for f in range(span.moving, span.end)])  # (F, B, L, D)
        timesteps = self.timesteps[span.steps[span.moving - span.start :]][:, None].expand(-1, self.videos)
        branches = [
            predicted_x0(engine.diffusion.prediction, part, latents, timesteps, engine.alphas_cumprod)
            for part in output.split(self.videos, dim=1)
        ]
        return branches[0] if len(branches) == 1 else guide(branches[0], branches[1], self.request.guidance_scale)

    def update(self, span: _Span, x0: Tensor) -> list[FinishedFrames]:
        """Makes the moving frames' step, and returns those that are final, if any."""
        steps = span.steps[span.moving - span.start :]
        latents = torch.stack([self.frames[f] for f in range(span.moving, span.end)])
        shape = (-1, 1, 1, 1)
        latents = self.x_factor[steps].view(shape) * latents + self.x0_factor[steps].view(shape) * x0
        self.frames.update(zip(range(span.moving, span.end), latents.unbind(), strict=True))
        self.stored = span.moving
        final = self._finished(self.iteration)
        needed = self.stored if self.window is None else self.cache.base
        self.frames = {f: x for f, x in self.frames.items() if f >= needed}
        if final == span.moving:
            return []
        done = torch.stack([self.frames[f] for f in range(span.moving, final)], dim=1)
        return [FinishedFrames(self.request_id, span.moving, done, self.done)]

    @property
    def _frame_shape(self) -> tuple[int, int]:
        return self.engine.model.config.num_tokens, self.engine.model.config.token_dim

    def _started(self, iteration: int) -> int:
        """Frames, from the first on, that have made a step after ``iteration``, or were given."""
        if iteration < 1:
            return self.given
        lag = self.request.ar_step
        return min(self.request.num_frames, self.given + (iteration - 1) // lag + 1) if lag else self.request.num_frames

    def _finished(self, iteration: int) -> int:
        """Frames, from the first on, that are clean after ``iteration``."""
        return self._started(iteration - self.request.num_inference_steps + 1)


def _given(request: SampleRequest) -> int:
    return 0 if request.condition is None else request.condition.shape[1]


def _sequences(request: SampleRequest) -> int:
    return len(request.seeds) * (1 if request.guidance_scale == 1.0 else 2)


def _window(request: SampleRequest, num_frames: int) -> int | None:
    """Frames of the moving window, or None where every frame before counts (up to the model's band)."""
    return num_frames if request.executor == "window" and request.num_frames > num_frames else None


def _room(request: SampleRequest, model: DiT) -> int:
    """Frames that the cache must hold at once."""
    config = model.config
    if (window := _window(request, config.num_frames)) is not None:
        return window
    lag = request.ar_step
    together = request.num_frames if lag == 0 else -(-request.num_inference_steps // lag) + 2 + _given(request)
    if config.attention_window is None:
        return request.num_frames
    # Twice the band, so that frames are moved to the front of the cache rarely.
    return min(request.num_frames, 2 * config.attention_window + together)
