"""ARDiffusionPipeline: generates videos from classes, prompts and seeds with a trained AR-VAE and AR-DiT.

Shapes: B videos, F frames, H W pixels, L tokens, D latent width.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from ardiff import hub
from ardiff.adapters import read_adapter
from ardiff.config import to_dict
from ardiff.data import storage
from ardiff.data.latents import LatentStatistics
from ardiff.data.texts import UsedEncoder
from ardiff.data.transforms import to_uint8, to_unit
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.solvers import model_timesteps
from ardiff.dit import DiT
from ardiff.dit.lora import merged
from ardiff.errors import CheckpointError
from ardiff.model_card import ModelCard, write_card
from ardiff.models import AnyAutoencoderConfig, AnyDiTConfig, make_autoencoder, make_dit
from ardiff.output import OutputType, VideoOutput, check_output, draw_seeds, to_output
from ardiff.pretrained import (
    CONFIG,
    PIPELINE,
    build_config,
    find_model,
    load_weights,
    local_folder,
    read_config,
    write_model,
)
from ardiff.resolution import Resolution
from ardiff.sampling.config import EngineConfig
from ardiff.sampling.control import Apply, Encode, LiveControl
from ardiff.sampling.engine import SamplingEngine
from ardiff.sampling.full import stream_request
from ardiff.sampling.params import (
    FrameCondition,
    InvalidParamError,
    ModelInfo,
    SamplingParams,
    expand_params,
    validate,
)
from ardiff.sampling.request import EncodedPrompt, SampleRequest
from ardiff.sampling.text import Encoder, PromptEncoder
from ardiff.vae import ARAutoencoder, DecoderCache

StepCallback = Callable[["ARDiffusionPipeline", int, Tensor, dict[str, Any]], Any]
MAX_DECODED = 16
"""Frames that are decoded at once, summed over videos. Bounds the memory of decoding."""


class ARDiffusionPipeline:
    """Generates videos. Needs neither Ray nor the trainer.

    >>> pipeline = ARDiffusionPipeline.from_pretrained("runs/quickstart/pipeline")
    >>> output = pipeline(class_label=[0, 1], num_frames=16, ar_step=5, seed=[0, 1])
    >>> output.frames  # uint8 (2, 16, H, W, 3)
    """

    def __init__(
        self,
        vae: ARAutoencoder,
        dit: DiT,
        diffusion: DiffusionConfig,
        statistics: LatentStatistics,
        class_names: Sequence[str] = (),
        engine: EngineConfig | None = None,
        text_source: UsedEncoder | None = None,
        text_encoder: Encoder | None = None,
    ) -> None:
        """
        Args:
            engine: Configures the modes ``window`` and ``rolling``.
            text_source: The text encoder with which the AR-DiT was trained.
            text_encoder: The same encoder, if it is loaded already.

        Raises:
            CheckpointError: The latents of the two models differ in shape, or the text encoder does not fit.
        """
        vae_shape, dit_shape = ((m.config.num_tokens, m.config.token_dim) for m in (vae, dit))
        if vae_shape != dit_shape:
            raise CheckpointError(
                f"The AR-VAE has (L, D) = {vae_shape} latents, the AR-DiT {dit_shape}: they do not fit."
            )
        self.vae, self.dit = vae.eval(), dit.eval()
        self.diffusion = diffusion
        self.statistics = statistics
        self.class_names = list(class_names)
        self.engine_config = engine or EngineConfig()
        self.without_lora: dict[str, Tensor] = {}
        """Weights of the AR-DiT before adapters were added, by name."""
        self.text = PromptEncoder(dit.config.condition_dim, text_source, text_encoder)

    @classmethod
    def from_pretrained(
        cls,
        uri: str,
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype = torch.float32,
        engine: EngineConfig | None = None,
        *,
        revision: str | None = None,
        local_files_only: bool = True,
        text_encoder: str | None = None,
    ) -> ARDiffusionPipeline:
        """Loads a pipeline that :meth:`save_pretrained` or :meth:`push_to_hub` has written.

        Args:
            uri: A folder, local or ``s3://``, or the name ``org/name`` of a hub repository. A local folder of that name
                comes first, then the hub's cache.
            device, torch_dtype: Of the weights.
            engine: As in the constructor.
            revision: Branch, tag or commit of a hub repository.
            local_files_only: False allows to download a repository that is not in the cache.
            text_encoder: Where the text encoder is, if not where the folder says. It is loaded at the first prompt, and
                checked then.

        Raises:
            CheckpointError: The pipeline is missing or incomplete, or its weights do not fit its configuration.
        """
        with local_folder(find_model(uri, revision, local_files_only)) as folder:
            config = read_config(folder, PIPELINE)
            vae = make_autoencoder(build_config(AnyAutoencoderConfig, config["vae"]))
            dit = make_dit(build_config(AnyDiTConfig, config["dit"]))
            source = None
            if "text_encoder" in config:
                source = build_config(UsedEncoder, config["text_encoder"])
                source = source if text_encoder is None else replace(source, uri=text_encoder)
            return cls(
                load_weights(vae, folder / "vae.safetensors"),
                load_weights(dit, folder / "dit.safetensors"),
                build_config(DiffusionConfig, config["diffusion"]),
                LatentStatistics(**config["latent_statistics"]),
                config["class_names"],
                engine,
                source,
            ).to(device, torch_dtype)

    def save_pretrained(self, uri: str, card: ModelCard | None = None, name: str = "") -> None:
        """Writes ``config.json``, ``vae.safetensors`` and ``dit.safetensors`` to a folder, local or ``s3://``.

        With ``card`` it also writes ``README.md``, the card of the model ``name``, and ``sheet.png`` if there is one.
        """
        config = {
            "kind": PIPELINE,
            "vae": to_dict(self.vae.config),
            "dit": to_dict(self.dit.config),
            "diffusion": to_dict(self.diffusion),
            "latent_statistics": asdict(self.statistics),
            "class_names": self.class_names,
        }
        if self.text.source is not None:
            config["text_encoder"] = to_dict(self.text.source)
        modules = {"vae": dict(self.vae.named_parameters()), "dit": dict(self.dit.named_parameters())}
        if card is not None:
            write_card(uri, name or uri.rstrip("/").rpartition("/")[2], config, card)
        write_model(uri, config, modules)

    def push_to_hub(
        self,
        repo_id: str,
        card: ModelCard | None = None,
        *,
        revision: str | None = None,
        private: bool = False,
        commit_message: str = "Upload of a pipeline by ardiff",
        token: str | None = None,
    ) -> str:
        """Uploads the pipeline with a model card to a hub repository, which is created if it is missing.

        Args:
            repo_id: ``org/name``.
            card: What the model card says beside the model's configuration.
            revision: Branch, created if it is missing. None is the main branch.
            private: Whether a new repository is private.
            commit_message: Of the commit.
            token: None takes the one that ``hf auth login`` has stored, or ``HF_TOKEN``.

        Returns:
            The hash of the commit, a ``revision`` for :meth:`from_pretrained`.

        Raises:
            CheckpointError: The hub cannot be reached, or does not allow it.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, card or ModelCard(), repo_id)
            path = Path(folder)
            return hub.upload(path, repo_id, revision=revision, private=private, message=commit_message, token=token)

    def to(self, *args: Any, **kwargs: Any) -> ARDiffusionPipeline:
        """Moves both models to a device, converts their weights to a dtype, or both: the arguments of
        ``torch.nn.Module.to``."""
        self.vae.to(*args, **kwargs)
        self.dit.to(*args, **kwargs)
        return self

    def load_lora(self, uri: str, strength: float = 1.0) -> None:
        """Adds a low-rank adapter to the weights of the AR-DiT, so that sampling costs no more. Several may be added.

        Args:
            uri: Folder of the adapter, local or ``s3://``: ``lora`` in a trained pipeline, or one that PEFT has
                written. It must have been trained on this pipeline, or on one with the same layers.
            strength: The factor of its updates.

        Raises:
            CheckpointError: There is no adapter, it is damaged, or it does not fit the model.
        """
        adapter = read_adapter(uri)
        parameters = dict(self.dit.named_parameters())
        changed = merged(parameters, adapter.weights, strength * adapter.scale)
        for name, weight in changed.items():
            self.without_lora.setdefault(name, parameters[name].detach().clone())
            parameters[name].data = weight.detach()

    def unload_lora(self) -> None:
        """Restores the weights from before the first :meth:`load_lora`."""
        parameters = dict(self.dit.named_parameters())
        for name, weight in self.without_lora.items():
            parameters[name].data = weight.to(parameters[name])
        self.without_lora.clear()

    @property
    def device(self) -> torch.device:
        """The device of both models."""
        return next(self.dit.parameters()).device

    @property
    def info(self) -> ModelInfo:
        """What the model can sample."""
        return ModelInfo.from_configs(self.dit.config, self.diffusion, self.vae.config.shapes, self.class_names)

    def __call__(
        self,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        condition: Tensor | None = None,
        condition_at: Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: OutputType = "uint8",
        fps: float = 8.0,
        on_frames: Callable[[int], None] = lambda final_frames: None,
        callback_on_step_end: StepCallback | None = None,
        **changes: Any,
    ) -> VideoOutput:
        """Generates videos. A video depends on its own parameters only, not on the other videos of the call.

        >>> pipeline(class_label=[0, 3], seed=[1, 2], num_frames=128, ar_step=5).frames

        Args:
            params: Parameters of one video, or of each; they may differ in those of a single video only, such as
                ``prompt`` and ``seed``. None is the defaults of :class:`~ardiff.sampling.params.SamplingParams`.
            condition: Given first frames, uint8 ``(k, H, W, 3)`` or ``(B, k, H, W, 3)``: one frame animates an image,
                several continue a clip. The video holds them as the AR-VAE reconstructs them.
            condition_at: Indices of the given frames in the video; only ``0..k-1`` is possible.
            generator: Draws the seeds, one per video, instead of ``seed``; or one generator per video.
            output_type: The form of the frames, see :func:`~ardiff.output.to_output`.
            fps: Frames per second of ``output_type="mp4"``.
            on_frames: Called with the number of final frames whenever it grows.
            callback_on_step_end: Called after each iteration with the pipeline, the index of the iteration, the
                timesteps that the frames have reached, int64 ``(F,)`` on the CPU, and an empty dictionary. An exception
                in it stops the call.
            changes: Fields of :class:`~ardiff.sampling.params.SamplingParams` that replace those of ``params``.
                ``class_label``, ``prompt``, ``negative_prompt``, ``conditions`` and ``seed`` also take sequences with a
                value per video; a single value goes with all values of the others.

        Returns:
            The videos in ``frames``, by default uint8 ``(B, F, H, W, 3)`` on the CPU.

        Raises:
            TypeError: An unknown parameter; names the nearest one.
            ValueError: A parameter or the condition is out of range; says what is valid.
            CheckpointError: The text encoder is missing, or it is another than in training.
        """
        check_output(output_type, fps)
        frames = []
        for frame in self.stream(
            params,
            condition=condition,
            condition_at=condition_at,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            **changes,
        ):
            frames.append(frame)
            on_frames(len(frames))
        return to_output(torch.stack(frames, dim=1), output_type, fps)

    def stream(
        self, params: SamplingParams | Sequence[SamplingParams] | None = None, **options: Any
    ) -> Iterator[Tensor]:
        """Like calling the pipeline, but yields each frame, uint8 ``(B, H, W, 3)``, as soon as it is final.

        The first frame comes after ``num_inference_steps`` iterations, then one every ``ar_step``. Memory does not grow
        with the number of frames, except for the latents in mode ``full``. Arguments are checked on the first frame.

        Args:
            params: As in a call.
            options: Arguments of :meth:`stream_latents`.
        """
        cache, changes = DecoderCache(), {"size": options["size"]} if "size" in options else {}
        shape = self.info.shape_of(expand_params(params, **changes)[0])
        for latents in self.stream_latents(params, **options):
            yield from self.decode(latents, cache, shape)

    @torch.no_grad()
    def stream_latents(
        self,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        condition: Tensor | None = None,
        condition_at: Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback_on_step_end: StepCallback | None = None,
        control: LiveControl | None = None,
        **changes: Any,
    ) -> Iterator[Tensor]:
        """Like :meth:`stream`, but yields clean diffusion latents ``(B, n, L, D)`` of the n frames that became final,
        for :meth:`decode`.

        ``control`` changes the condition on the way, except in mode ``full``.
        """
        if generator is not None:
            if "seed" in changes:
                raise ValueError("give either seed or generator, not both")
            changes["seed"] = draw_seeds(generator, len(expand_params(params, **changes)))
        videos = expand_params(params, **changes)
        if videos[0].mode == "full":
            if control is not None:
                raise InvalidParamError("mode", "a live control needs mode=window or mode=rolling, got mode=full")
            request = self._request(videos, condition, condition_at)
            on_step = self._step_callback(request, callback_on_step_end)
            yield from stream_request(self.dit, self.diffusion, request, self.text.max_tokens, on_step)
            return
        control = control or LiveControl()
        stream = _Stream(self, videos, condition, condition_at)
        with control.attached(stream.start):
            yield from stream.latents(control, self._step_callback(stream.request, callback_on_step_end))

    def _request(
        self, videos: Sequence[SamplingParams], condition: Tensor | None, condition_at: Sequence[int] | None
    ) -> SampleRequest:
        """The checked request of a call, with given frames and prompts encoded."""
        info, given_frames = self.info, 0 if condition is None or condition.ndim < 4 else condition.shape[-4]
        if videos[0].given_frames not in (0, given_frames):
            raise ValueError(f"given_frames is {videos[0].given_frames}, but condition holds {given_frames} frames")
        videos = [validate(replace(video, given_frames=given_frames), info) for video in videos]
        given = self.encode_condition(condition, condition_at, len(videos), info.shape_of(videos[0]))
        prompts, shape = self.encode_prompts(videos), info.shape_index(videos[0])
        return SampleRequest(videos=tuple(videos), condition=given, prompts=prompts, shape=shape)

    def _stores_sink_first(self, params: SamplingParams) -> bool:
        """Whether the engine needs an iteration more, for the sink of a window that the given frames have left."""
        return params.sink_frames > 0 and params.mode == "window" and params.given_frames >= self.dit.config.num_frames

    def _step_callback(self, request: SampleRequest, callback: StepCallback | None) -> Callable[[int], None]:
        """Calls ``callback`` with the timesteps that the frames have reached after an iteration of this index."""
        if callback is None:
            return lambda step: None
        params = request.params
        steps, spacing = params.resolved_num_inference_steps, params.resolved_timestep_spacing
        timesteps = model_timesteps(self.diffusion, steps, spacing)
        lag = (torch.arange(params.num_frames) - params.given_frames) * params.resolved_ar_step  # (F,)
        given = torch.arange(params.num_frames) < params.given_frames

        def on_step(step: int) -> None:
            reached = (step + 1 - lag).clamp(0, len(timesteps) - 1)
            callback(self, step, timesteps[reached.masked_fill(given, len(timesteps) - 1)], {})

        return on_step

    def encode_prompts(self, videos: Iterable[SamplingParams]) -> dict[str, EncodedPrompt]:
        """Every text of the videos, encoded for a :class:`SampleRequest`.

        Raises:
            CheckpointError: The text encoder is missing, or it is another than in training.
            InvalidParamError: A prompt is too long, if ``long_prompts`` of the engine's configuration is ``error``.
        """
        texts = dict.fromkeys(text for video in videos for text in video.texts)
        return self.text.encode(texts, self.device, self.engine_config.long_prompts)

    def engine(self, config: EngineConfig | None = None) -> SamplingEngine:
        """A :class:`SamplingEngine`, which runs many requests on this model together."""
        return SamplingEngine(self.dit, self.diffusion, config or self.engine_config)

    @torch.no_grad()
    def decode(self, latents: Tensor, cache: DecoderCache, shape: Resolution | None = None) -> Iterator[Tensor]:
        """Decodes diffusion latents ``(B, n, L, D)`` to n frames, uint8 ``(B, H, W, 3)``; ``cache`` holds the frames
        before them, and ``shape`` is one of those that the model knows, by default the first."""
        for chunk in latents.split(max(1, MAX_DECODED // latents.shape[0]), dim=1):
            video = self.vae.decode(self.statistics.denormalise(chunk.to(self.vae_dtype)), cache, shape=shape)
            yield from to_uint8(video).cpu().unbind(dim=1)

    @property
    def vae_dtype(self) -> torch.dtype:
        """The type of the AR-VAE's weights."""
        return next(self.vae.parameters()).dtype

    def encode_condition(
        self,
        condition: Tensor | None,
        condition_at: Sequence[int] | None,
        videos: int,
        shape: Resolution | None = None,
    ) -> Tensor | None:
        """Encodes given frames of ``shape``, by default the model's first, as diffusion latents ``(B, k, L, D)`` for
        ``videos`` videos; None without a condition.

        Raises:
            ValueError: The condition has another shape or type, or is not at the first frames.
        """
        if condition is None:
            if condition_at is not None:
                raise ValueError("condition_at is set, but there is no condition")
            return None
        height, width = shape or self.vae.config.resolution
        if condition.ndim == 4:
            condition = repeat(condition, "k h w c -> b k h w c", b=videos)
        if condition.dtype != torch.uint8 or condition.shape[0] != videos or condition.shape[2:] != (height, width, 3):
            raise ValueError(
                f"condition must be uint8 (k, {height}, {width}, 3) or ({videos}, k, {height}, {width}, 3), got "
                f"{condition.dtype} {tuple(condition.shape)}"
            )
        count = condition.shape[1]
        if not count:
            raise ValueError("condition must hold at least one frame")
        if condition_at is not None and list(condition_at) != list(range(count)):
            raise ValueError(
                f"given frames can only be the first ones, 0..{count - 1}, not {list(condition_at)}: the model is "
                "causal, so a frame never sees a later one and cannot lead to it"
            )
        return self.statistics.normalise(self.vae.latents(to_unit(condition.to(self.device)).to(self.vae_dtype)))


class _Stream:
    """A call of the pipeline on an engine of its own."""

    def __init__(
        self,
        pipeline: ARDiffusionPipeline,
        videos: Sequence[SamplingParams],
        condition: Tensor | None,
        condition_at: Sequence[int] | None,
    ) -> None:
        self.pipeline, self.videos, self.given = pipeline, videos, (condition, condition_at)

    def start(self, changes: Mapping[str, Any]) -> tuple[Encode, Apply]:
        """Submits the request with changes from frame 0 on. Returns functions for later changes."""
        videos = self.videos
        if changes:
            videos = [video.with_change(FrameCondition(frame=0, **changes)) for video in videos]
        self.request = self.pipeline._request(videos, *self.given)
        config, params = self.pipeline.engine_config, self.request.params
        max_frames = max(config.max_frames, params.num_frames * len(videos))
        self.engine = self.pipeline.engine(replace(config, max_frames=max_frames))
        self.request_id = self.engine.submit(self.request)

        def encode(changes: Mapping[str, Any]) -> Mapping[str, EncodedPrompt]:
            changed = replace(params, conditions=(FrameCondition(frame=0, **changes),))
            return self.pipeline.encode_prompts((validate(changed, self.engine.info),))

        return encode, functools.partial(self.engine.change, self.request_id)

    def latents(self, control: LiveControl, on_step: Callable[[int], None]) -> Iterator[Tensor]:
        """Clean latents ``(B, n, L, D)`` of the n frames that became final."""
        step = -1 if self.pipeline._stores_sink_first(self.request.params) else 0
        try:
            if self.request.condition is not None:
                yield self.request.condition
            while self.engine.busy:
                with control.iteration():
                    events = self.engine.step()
                if step >= 0:
                    on_step(step)
                step += 1
                for finished in events:
                    yield finished.latents
        finally:
            self.engine.cancel(self.request_id)  # frees memory after a failure, or if the caller stops early


def read_info(uri: str) -> ModelInfo:
    """What the pipeline in a folder, local or ``s3://``, can sample; reads its ``config.json`` but no weights.

    Raises:
        CheckpointError: There is no pipeline of this format.
    """
    if not storage.exists(storage.join(uri, CONFIG)):
        raise CheckpointError(f"There is no pipeline in {uri}: it should hold {CONFIG}.")
    config = read_config(uri, PIPELINE)
    dit, vae = build_config(AnyDiTConfig, config["dit"]), build_config(AnyAutoencoderConfig, config["vae"])
    diffusion = build_config(DiffusionConfig, config["diffusion"])
    return ModelInfo.from_configs(dit, diffusion, vae.shapes, config["class_names"])
