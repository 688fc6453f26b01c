"""The sampling engine: many requests, one packed model pass per iteration; each frame is evaluated only while it moves.

For F frames and S sampling steps a request costs ``F S + F - 1`` frame evaluations whatever its ``ar_step``, more where
a window moves (:mod:`ardiff.sampling.cost`). A frame that has not started cannot influence an earlier one, so it is not
evaluated. A finished frame never changes again: one evaluation at the clean timestep (prefill) stores the keys and
values that all later frames use.

Shapes: B videos of a request, F frames evaluated in an iteration, L tokens, D latent width.
"""

import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ardiff import onednn
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.solvers import solver_table
from ardiff.dit import DiT
from ardiff.errors import ArdiffError
from ardiff.sampling.backend import prepare_model
from ardiff.sampling.cache import FrameCache
from ardiff.sampling.config import AttentionBackend, Backend, EngineConfig
from ardiff.sampling.cost import sequential_passes
from ardiff.sampling.groups import AttentionGroups
from ardiff.sampling.params import FrameCondition, InvalidParamError, ModelInfo, validate
from ardiff.sampling.request import EncodedPrompt, FinishedFrames, SampleRequest
from ardiff.sampling.saved import SavedState
from ardiff.sampling.state import FrameSpan, RequestState, SampledModel
from ardiff.tensors import to_device


class EngineLimitError(ArdiffError):
    """A request exceeds the engine's limits, or too many requests wait already."""


class PlannedChange(NamedTuple):
    """A change of a request's condition that is checked, and not made yet."""

    frame: int
    """The first frame that has it."""
    apply: Callable[[], None]
    """Makes the change. Call it before the engine does anything else."""


class SamplingEngine:
    """Runs requests together. Plain synchronous code: call :meth:`step` until :attr:`busy` is false.

    The result of a request does not depend on other requests, up to the rounding of the packed matrix products.
    """

    def __init__(self, model: DiT, diffusion: DiffusionConfig, config: EngineConfig | None = None) -> None:
        """``model`` is in evaluation mode and on its device; it was trained with ``diffusion``."""
        self.config = config or EngineConfig()
        self.info = ModelInfo.from_configs(model.config, diffusion)
        on_cpu = next(model.parameters()).device.type == "cpu"
        attention: AttentionBackend = "stacked"
        if on_cpu:
            attention = "ragged" if model.config.num_tokens >= 16 else "masked"
        chosen = self.config.attention_backend
        self._attention = AttentionGroups(attention if chosen == "auto" else chosen)
        backend: Backend = "packed" if onednn.packable(model) else "plain"
        self._model = prepare_model(model, backend if self.config.backend == "auto" else self.config.backend)
        self._shared = SampledModel(model, diffusion)
        self.frame_evaluations = 0
        """Frames evaluated so far, without the second branch of guidance."""
        self._ids = itertools.count()
        self._waiting: deque[tuple[int, SampleRequest]] = deque()
        self._running: dict[int, RequestState] = {}

    @property
    def busy(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self._waiting or self._running)

    @property
    def iterations(self) -> dict[int, int]:
        """Iterations that each running request has made; the others wait for capacity."""
        return {request_id: state.iteration for request_id, state in self._running.items()}

    def submit(self, request: SampleRequest) -> int:
        """Queues a request, which starts with the next iteration that has capacity for it. Returns its id.

        Raises:
            ValueError: A parameter is out of range, or the model cannot do what it asks for; says what is valid.
            EngineLimitError: The request exceeds the limits, or too many requests wait already.
        """
        request = self.check(request)
        if len(self._waiting) >= self.config.max_waiting + self.config.max_requests - len(self._running):
            raise EngineLimitError(f"{len(self._waiting)} requests wait already, which is the limit: try again later.")
        request_id = next(self._ids)
        self._waiting.append((request_id, request))
        return request_id

    def check(self, request: SampleRequest) -> SampleRequest:
        """Returns the request with ``ar_step`` filled in. Raises like :meth:`submit`, except for a full queue."""
        if request.params.mode == "full":
            raise InvalidParamError("mode", "the engine takes mode=window and mode=rolling, got mode=full")
        request = replace(request, videos=tuple(validate(params, self.info) for params in request.videos))
        params, videos = request.params, len(request.videos)
        config = self._shared.model.config
        self._check_resumption(request)
        expected = (videos, request.final, config.num_tokens, config.token_dim) if request.final else None
        shape = None if request.condition is None else tuple(request.condition.shape)
        if shape != expected:
            raise ValueError(f"condition must be {expected} with {request.final} frames given or final, got {shape}")
        for text in {text for video in request.videos for text in video.texts}:
            if (width := request.prompt(text).states.shape[1]) != config.condition_dim:
                raise ValueError(f"the token states of a prompt must be {config.condition_dim} wide, got {width}")
        if params.num_frames * videos > self.config.max_frames:
            raise EngineLimitError(
                f"{videos} x {params.num_frames} frames are beyond the limit of {self.config.max_frames} frames."
            )
        if (needed := self.num_bytes([request])) > self.config.max_cache_bytes:
            raise EngineLimitError(
                f"The request needs {needed / 2**20:.0f} MiB for keys, values and modulations, the limit is "
                f"{self.config.max_cache_bytes / 2**20:.0f} MiB: ask for fewer videos at once, or a larger ar_step."
            )
        return request

    def _check_resumption(self, request: SampleRequest) -> None:
        if (state := request.resume) is None:
            return
        params, config = request.params, self._shared.model.config
        if not 0 <= state.iteration < sequential_passes(params):
            raise ValueError(f"the saved state has {state.iteration} iterations of {sequential_passes(params)}")
        sampling = (params.resolved_num_inference_steps, params.resolved_solver, params.resolved_timestep_spacing)
        terms = 1 + solver_table(self._shared.diffusion, *sampling).history_size
        shape, frames = tuple(state.moving.shape), request.started - request.final
        expected = (len(request.videos), frames, terms, config.num_tokens, config.token_dim)
        if shape != expected:
            raise ValueError(f"the moving frames of the saved state must be {expected}, got {shape}")

    def num_bytes(self, requests: Sequence[SampleRequest]) -> int:
        """Memory of checked requests: keys and values of each, and what they share: the tables of modulations and
        of the keys and values of prompts and condition tokens."""
        config, dtype = self._shared.model.config, self._shared.weights_dtype
        caches = (FrameCache.num_bytes(config, r.sequences, r.cache_frames(config), dtype) for r in requests)
        return sum(caches) + self._shared.num_bytes(requests)

    def change(
        self, request_id: int, changes: Mapping[str, Any], prompts: Mapping[str, EncodedPrompt] | None = None
    ) -> int | None:
        """Replaces values of the condition of a request from the first frame on that has not started.

        Call it between iterations. The result is that of a request that has the change in ``conditions``, bit for bit.

        Args:
            changes: Fields of :class:`~ardiff.sampling.params.FrameCondition`, for all videos of the request.
            prompts: The text among them, encoded.

        Returns:
            The index of that frame; None if every frame has started, or the request has ended.

        Raises:
            InvalidParamError: A value is not valid for the model, or guidance is off in this request.
            EngineLimitError: The prompt does not fit into memory.
        """
        if (planned := self.plan_change(request_id, changes, prompts)) is None:
            return None
        planned.apply()
        return planned.frame

    def plan_change(
        self, request_id: int, changes: Mapping[str, Any], prompts: Mapping[str, EncodedPrompt] | None = None
    ) -> PlannedChange | None:
        """Like :meth:`change`, but leaves the last step to the caller, who may store the frame before."""
        state = self._running.get(request_id)
        queued = [index for index, (waiting_id, _) in enumerate(self._waiting) if waiting_id == request_id]
        if state is None and not queued:
            return None
        request = self._waiting[queued[0]][1] if state is None else state.request
        frame = request.started if state is None else state.started
        if frame >= request.params.num_frames:
            return None
        videos = [video.with_change(FrameCondition(frame=frame, **changes)) for video in request.videos]
        changed = self.check(replace(request, videos=tuple(videos), prompts={**request.prompts, **(prompts or {})}))
        if changed.guided != request.guided:
            raise InvalidParamError(
                "guidance_scale", "guidance is off in this request: start it with another guidance_scale than 1"
            )
        if state is None:
            return PlannedChange(frame, lambda: self._waiting.__setitem__(queued[0], (request_id, changed)))
        changed = changed.without_past(state.oldest)
        running = [changed if other is state else other.request for other in self._running.values()]
        if (spare := self.config.max_cache_bytes - self.num_bytes(running)) < 0:
            raise EngineLimitError("There is no memory for the keys and values of the prompt: try again later.")

        def apply() -> None:
            with torch.inference_mode():
                self._shared.evict(running, spare)
                state.set_request(changed)

        return PlannedChange(frame, apply)

    def save(self, request_id: int) -> SavedState:
        """The state of a running request between two iterations. An engine continues it, given as ``resume``.

        Raises:
            KeyError: The request waits, or has ended.
        """
        with torch.inference_mode():
            state = self._running[request_id].save()
        return replace(state, moving=state.moving.clone())  # see ``step``

    def cancel(self, request_id: int) -> bool:
        """Drops a request. Returns False if it is neither waiting nor running.

        Frees its memory, with ``stacked`` in the next iteration if others share its tensors. Allocates nothing, so that
        it also works after an iteration that failed for lack of memory.
        """
        waiting = len(self._waiting)
        self._waiting = deque(item for item in self._waiting if item[0] != request_id)
        running = self._running.pop(request_id, None) is not None
        self._attention.remove(request_id)
        return running or len(self._waiting) < waiting

    def run(self, request: SampleRequest, on_frames: Callable[[int], None] = lambda final_frames: None) -> Tensor:
        """Runs one request in an idle engine. Returns all its frames, also those given, ``(B, F, L, D)``."""
        request_id = self.submit(request)
        chunks: list[Tensor] = []
        while self.busy:
            for finished in self.step():
                assert finished.request_id == request_id
                chunks.append(finished.latents)
                on_frames(finished.first_frame + finished.latents.shape[1])
        given = [] if request.condition is None else [request.condition.to(self._shared.device, self._shared.dtype)]
        return torch.cat([*given, *chunks], dim=1)

    def step(self) -> list[FinishedFrames]:
        """One iteration of all running requests, in one pass of the model. Returns the frames that are final now."""
        with torch.inference_mode():
            self._group()  # frees what cancelled requests have left before others start
            self._start_waiting()
            self._group()
            finished = self._iterate()
            self._group()
        # A clone made outside of inference mode is an ordinary tensor, which the caller may change or differentiate.
        return [replace(frames, latents=frames.latents.clone()) for frames in finished]

    def _iterate(self) -> list[FinishedFrames]:
        states = [self._running[request_id] for request_id in self._attention.order]
        if not states:
            return []
        spans = [state.advance() for state in states]
        outputs, finished = self._evaluate(states, spans), []
        all_steps = to_device(torch.tensor([step for span in spans for step in span.steps]), self._shared.device)
        steps = all_steps.split([len(span.steps) for span in spans])
        for state, span, own_steps, output in zip(states, spans, steps, outputs, strict=True):
            self.frame_evaluations += len(span.steps) * len(state.request.videos)
            if (frames := state.update(span, own_steps, output)) is not None:
                finished.append(frames)
            if state.done:
                del self._running[state.request_id]
        return finished

    def _group(self) -> None:
        """Groups the running requests again if any has started or ended. Nothing else may hold those that ended."""
        self._attention.set_requests({request_id: state.cache for request_id, state in self._running.items()})

    def _start_waiting(self) -> None:
        """Starts waiting requests, oldest first, as long as the limits allow."""
        running = [state.request for state in self._running.values()]
        while self._waiting and len(running) < self.config.max_requests:
            request_id, request = self._waiting[0]
            running.append(request)
            if (spare := self.config.max_cache_bytes - self.num_bytes(running)) < 0:
                return
            self._waiting.popleft()
            self._shared.evict(running, spare)
            self._running[request_id] = RequestState(request_id, request, self._shared)

    def _evaluate(self, states: list[RequestState], spans: list[FrameSpan]) -> list[Tensor]:
        """The model's output for the evaluated frames of each request, ``(F B, L, D)`` each."""
        shared, pairs = self._shared, list(zip(states, spans, strict=True))
        inputs = torch.cat([latents for state, span in pairs for latents in state.inputs(span)])
        modulations = shared.tables.rows([row for state, span in pairs for row in state.modulations(span)])
        positions = torch.tensor([position for state, span in pairs for position in state.positions(span)])
        attend_text = None
        if shared.model.config.text:
            attend_text = shared.prompts.attention([key for state, span in pairs for key in state.prompts(span)])
        output = self._model.forward_frames(
            inputs.to(shared.weights_dtype),
            modulations,
            to_device(positions, shared.device),
            self._attention.of_blocks([(span.start, span.end) for span in spans], shared.model.config.depth),
            attend_text,
        )
        sizes = [len(span.steps) * state.request.sequences for state, span in pairs]
        return list(output.to(shared.dtype).split(sizes))
