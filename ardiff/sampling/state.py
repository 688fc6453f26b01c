"""The state of a running request: its latents, its cache, and its progress through the AD schedule.

Shapes: B videos of a request, F frames evaluated in an iteration, L tokens, D latent width, S sampling steps,
H tensors of a frame's history, M modulations of a frame, Q sequences (B, or 2 B with guidance), C conditions that
follow each other in a request.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ardiff.diffusion.ar_step import window_start
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.guidance import guide
from ardiff.diffusion.prediction import predicted_x0
from ardiff.diffusion.sampler import frame_noise
from ardiff.diffusion.solvers import solver_step, solver_table
from ardiff.dit import DiT
from ardiff.sampling.cache import FrameCache
from ardiff.sampling.conditions import ConditionTables
from ardiff.sampling.cost import final_frames, started_frames
from ardiff.sampling.modulations import ModulationTables, TableKey
from ardiff.sampling.prompts import PromptTables
from ardiff.sampling.request import FinishedFrames, PromptKey, SampleRequest
from ardiff.sampling.saved import SavedState
from ardiff.sampling.tables import SharedTables
from ardiff.tensors import to_device


class SampledModel:
    """A model with everything that its requests share."""

    def __init__(self, model: DiT, diffusion: DiffusionConfig) -> None:
        self.model, self.diffusion = model, diffusion
        weight = next(model.parameters())
        self.device, self.weights_dtype = weight.device, weight.dtype
        # Latents between iterations stay float32 when the weights are bfloat16.
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.alphas_cumprod = diffusion.alphas_cumprod().to(self.device)
        self.tables = ModulationTables(model, diffusion)
        self.prompts = PromptTables(model)
        self.conditions = ConditionTables(model)
        self._shared_tables: tuple[SharedTables[Any, Any], ...] = (self.tables, self.prompts, self.conditions)

    def num_bytes(self, requests: Sequence[SampleRequest]) -> int:
        """Memory of the tables that requests share."""
        return sum(tables.num_bytes_of(requests) for tables in self._shared_tables)

    def evict(self, running: Sequence[SampleRequest], spare_bytes: int) -> None:
        """Drops the oldest tables that no running request uses, until few are left and they fit ``spare_bytes``."""
        for tables in self._shared_tables:
            spare_bytes -= tables.evict(running, spare_bytes)


@dataclass(frozen=True, slots=True)
class FrameSpan:
    """The frames ``start .. end - 1``, which an iteration evaluates. Those before ``moving`` are clean: the iteration
    only stores their keys and values (prefill)."""

    start: int
    moving: int
    end: int
    steps: list[int]
    """The sampling step at which each frame is evaluated. For clean frames it is the last row of the modulations."""
    condition_index: list[int]
    """Which of the request's conditions each frame has."""


class RequestState:
    """A running request.

    After iteration n, frame f has made ``clamp(n - (f - given_frames) ar_step, 0, S)`` steps (see
    :mod:`ardiff.diffusion.ad`).
    """

    def __init__(self, request_id: int, request: SampleRequest, shared: SampledModel) -> None:
        self.request_id, self.shared = request_id, shared
        self.params, config = request.params, shared.model.config
        self.window = request.window(config)
        self.iteration = request.iteration
        # Frames before this one are clean, and their keys and values are in the cache, except those that are missing.
        self.stored = self._final(self.iteration - 1) if self.iteration else 0
        self.missing = self._missing()
        self.frames: dict[int, Tensor] = {}  # latents (B, L, D) of the frames that are still needed
        self.history: dict[int, Tensor] = {}  # (H, B, L, D) of the moving frames, for the solver
        if request.condition is not None:
            condition = request.condition.to(shared.device, shared.dtype)
            self.frames = dict(enumerate(condition.unbind(dim=1)))
        if request.resume is not None:
            moving = rearrange(request.resume.moving.to(shared.device, shared.dtype), "b f h l d -> f h b l d")
            self.frames |= dict(enumerate(moving[:, 0], request.final))
            self.history = dict(enumerate(moving[:, 1:], request.final))
        self.cache = FrameCache(
            config,
            request.sequences,
            request.cache_frames(config),
            shared.weights_dtype,
            shared.device,
            shared.conditions.prefix(request),
        )
        steps, spacing = self.params.resolved_num_inference_steps, self.params.resolved_timestep_spacing
        table = solver_table(shared.diffusion, steps, self.params.resolved_solver, spacing)
        self.solver = table.to(shared.device, shared.dtype)
        self.set_request(request)

    def set_request(self, request: SampleRequest) -> None:
        """Takes the conditions of the videos from ``request``, which differs in those of later frames only."""
        shared, starts = self.shared, request.starts
        self.request = request
        shared.prompts.prepare(request)
        tables, model = shared.tables, shared.model
        self.table_keys = [[tables.key(request, label) for label in request.labels(model, start)] for start in starts]
        self.clean_row = len(tables.timesteps(self.table_keys[0][0])) - 1
        self.guidance_scales = [request.guidance_scales(start) for start in starts]
        self.prompt_keys = [request.prompt_keys(start) for start in starts] if model.config.text else []

    @property
    def started(self) -> int:
        """The first frame that has not started."""
        return self._started(self.iteration)

    @property
    def oldest(self) -> int:
        """The first frame that may be evaluated again."""
        return min(self.frames, default=self.started)

    @property
    def done(self) -> bool:
        """Whether every frame has made all its steps."""
        return self._final(self.iteration) == self.params.num_frames

    def save(self) -> SavedState:
        """The state with which another engine continues after this iteration."""
        frames, config = range(self._final(self.iteration), self.started), self.shared.model.config
        if not frames:  # one frame follows another, and the next one has not started
            shape = (len(self.request.videos), 0, 1 + self.solver.history_size, config.num_tokens, config.token_dim)
            return SavedState(self.iteration, self.solver.advance.new_empty(shape))
        latents = torch.stack([self.frames[f] for f in frames])  # (F, B, L, D)
        history = torch.stack([self.history[f] for f in frames])  # (F, H, B, L, D)
        moving = torch.cat([latents[:, None], history], dim=1)
        return SavedState(self.iteration, rearrange(moving, "f h b l d -> b f h l d"))

    def advance(self) -> FrameSpan:
        """Starts the next iteration: draws the noise of frames that start. Returns the frames to evaluate."""
        if self.missing:
            return self._advance_missing()
        given = self.params.given_frames
        self.iteration += 1
        moving, end = self._final(self.iteration - 1), self._started(self.iteration)
        for frame in range(max(self._started(self.iteration - 1), given), end):
            self.frames[frame] = self._draw_noise(frame)
            self.history[frame] = self._initial_history(frame)
        if self.window is not None:
            first = window_start(end, self.window, self.params.window_stride)
            if first > self.cache.base:  # the window moved, so all frames but the sink see other frames than before
                self.cache.restart(first)
                self.stored = self._first_needed()
                self.frames = {f: x for f, x in self.frames.items() if f >= self.stored}
        else:
            self.cache.move(self._first_seen(self.stored))
        return self._span(self.stored, moving, end)

    def _missing(self) -> list[range]:
        """Clean frames whose keys and values the cache needs before the next iteration: those that a request has which
        another engine began, and the sink if many frames are given, so that the first window has moved already."""
        if self.window is None:
            return [range(self.stored)] if self.stored else []
        base = window_start(self._started(max(1, self.iteration)), self.window, self.params.window_stride)
        sink = self.params.sink_frames if base else 0
        return [frames for frames in (range(sink), range(base + sink if base else 0, self.stored)) if frames]

    def _advance_missing(self) -> FrameSpan:
        """The next missing frames, as many as the model saw in training at most, to store their keys and values."""
        frames, config = self.missing.pop(0), self.shared.model.config
        if self.window is None:
            self.cache.move(self._first_seen(frames.start))
        elif frames.start >= self.params.sink_frames:
            self.cache.restart(window_start(self.started, self.window, self.params.window_stride))
        end = min(frames.stop, frames.start + config.num_frames, self.cache.base + self.cache.capacity)
        if end < frames.stop:
            self.missing.insert(0, range(end, frames.stop))
        return self._span(frames.start, end, end)

    def _first_seen(self, frame: int) -> int:
        """A frame before all that ``frame`` and later ones see. It changes once in as many frames as the model's band
        has, because the cache is moved then."""
        band = self.shared.model.config.attention_window
        return 0 if band is None else max(0, (frame - band + 1) // band * band)

    def _span(self, start: int, moving: int, end: int) -> FrameSpan:
        """The frames ``start .. end - 1`` at the sampling steps that they make in this iteration."""
        given, num_steps = self.params.given_frames, self.params.resolved_num_inference_steps
        made = [self.iteration - 1 - (frame - given) * self.params.resolved_ar_step for frame in range(start, end)]
        steps = [
            self.clean_row if frame < given or step >= num_steps else max(0, step)
            for frame, step in enumerate(made, start)
        ]
        starts = self.request.starts
        return FrameSpan(start, moving, end, steps, [bisect_right(starts, f) - 1 for f in range(start, end)])

    def _first_needed(self) -> int:
        """The first frame after the sink whose latents the window holds; 0 before it has moved."""
        return self.cache.base + self.params.sink_frames if self.cache.base else 0

    def inputs(self, span: FrameSpan) -> list[Tensor]:
        """Latents ``(B, L, D)`` of the evaluated frames, once per branch of guidance, frame by frame."""
        branches = 2 if self.request.guided else 1
        return [self.frames[f] for f in range(span.start, span.end) for _ in range(branches)]

    def modulations(self, span: FrameSpan) -> list[tuple[TableKey, int]]:
        """Table and row of the modulations of the evaluated frames, ``F Q`` of them, frame by frame."""
        frames = zip(span.condition_index, span.steps, strict=True)
        return [(key, step) for index, step in frames for key in self.table_keys[index]]

    def prompts(self, span: FrameSpan) -> list[PromptKey]:
        """Prompts of the evaluated frames of a model with text, as many as ``F Q``, frame by frame."""
        return [key for index in span.condition_index for key in self.prompt_keys[index]]

    def positions(self, span: FrameSpan) -> list[int]:
        """Frame positions as the model sees them, ``F Q`` of them: within the window, or in the whole video."""
        origin = 0 if self.window is None else self.cache.base
        return [f - origin for f in range(span.start, span.end) for _ in range(self.request.sequences)]

    def update(self, span: FrameSpan, steps: Tensor, output: Tensor) -> FinishedFrames | None:
        """Makes one sampling step of the moving frames. Returns the frames that are final now, or None.

        Args:
            steps: ``span.steps`` on the model's device, int64 ``(F,)``.
            output: What the model returned for the evaluated frames, ``(F Q, L, D)``.
        """
        if span.moving == span.end:
            return None
        self.stored = span.moving
        moving, first = range(span.moving, span.end), span.moving - span.start
        latents = torch.stack([self.frames[f] for f in moving])  # (F, B, L, D)
        output = output.unflatten(0, (span.end - span.start, self.request.sequences))[first:]
        x0 = self._predict(output, latents, steps[first:], span.condition_index[first:])
        history: tuple[Tensor, ...] = ()
        if self.solver.history_size:
            history = torch.stack([self.history[f] for f in moving]).unbind(dim=1)  # H times (F, B, L, D)
        latents, history = solver_step(latents, x0, history, steps[first:], self.solver)
        self.frames.update(zip(moving, latents.unbind(), strict=True))
        if history:
            self.history.update(zip(moving, torch.stack(history, dim=1).unbind(), strict=True))
        final = self._final(self.iteration)
        for frame in range(span.moving, final):
            del self.history[frame]
        needed = self.stored if self.window is None else self._first_needed()
        self.frames = {f: x for f, x in self.frames.items() if f >= needed}
        if final == span.moving:
            return None
        finished = torch.stack([self.frames[f] for f in range(span.moving, final)], dim=1)
        return FinishedFrames(self.request_id, span.moving, finished, self.done)

    def _predict(self, output: Tensor, latents: Tensor, steps: Tensor, condition_index: list[int]) -> Tensor:
        """Guided clean latents ``(F, B, L, D)`` from the model's output ``(F, Q, L, D)`` for moving frames at sampling
        steps ``(F,)``."""
        videos = len(self.request.videos)
        timesteps = self.solver.timesteps[steps][:, None].expand(-1, videos)
        prediction, alphas_cumprod = self.shared.diffusion.prediction, self.shared.alphas_cumprod
        branches = [
            predicted_x0(prediction, branch, latents, timesteps, alphas_cumprod)
            for branch in output.split(videos, dim=1)
        ]
        if not self.request.guided:
            return branches[0]
        scales = torch.tensor([self.guidance_scales[c] for c in condition_index], dtype=latents.dtype)  # (F, B)
        return guide(branches[0], branches[1], to_device(scales, latents.device)[..., None, None])

    def _initial_history(self, frame: int) -> Tensor:
        """The history of a frame before its first step, ``(H, B, L, D)``: empty, for ``lcm`` its later noise."""
        size, like = self.solver.history_size, self.frames[frame]
        if self.solver.solver == "lcm" and size:
            return torch.stack([self._draw_noise(frame, step) for step in range(1, size + 1)])
        return like.new_zeros(size, *like.shape)

    def _draw_noise(self, frame: int, step: int = 0) -> Tensor:
        """Noise of a frame before a sampling step, ``(B, L, D)``: each video's depends on its own seed only."""
        config, device = self.shared.model.config, self.shared.device
        draws = [frame_noise(v.seed, frame, config.num_tokens, config.token_dim, step) for v in self.request.videos]
        return to_device(torch.stack(draws).to(self.shared.dtype), device)

    def _started(self, iteration: int) -> int:
        return started_frames(self.params, iteration)

    def _final(self, iteration: int) -> int:
        return final_frames(self.params, iteration)
