"""ARDiffusionPipeline: a trained AR-VAE and AR-DiT that turn class labels and seeds into videos.

Shapes: B videos, F frames, H W pixels, L tokens, D latent width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Literal, get_args

import torch
from einops import repeat
from torch import Tensor

from ardiff.config import to_dict
from ardiff.data.latents import LatentStatistics
from ardiff.data.transforms import to_uint8, to_unit
from ardiff.diffusion.ad import ad_schedule
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.guidance import guided_denoiser
from ardiff.diffusion.sampler import initial_noise, stream_full
from ardiff.dit import DiT
from ardiff.errors import CheckpointError
from ardiff.models import AnyAutoencoderConfig, AnyDiTConfig, make_autoencoder, make_dit
from ardiff.pretrained import build_config, load_weights, local_folder, read_config, write_model
from ardiff.sampling import EngineConfig, SampleRequest, SamplingEngine
from ardiff.vae import ARAutoencoder, DecoderCache

Executor = Literal["window", "rolling", "full"]

MAX_DECODED = 16
"""Frames that are decoded at once, those of all videos together: what bounds the memory of decoding."""


class ARDiffusionPipeline:
    """Generates videos. Neither Ray nor the trainer is needed.

    >>> pipeline = ARDiffusionPipeline.from_pretrained("runs/quickstart/pipeline")
    >>> video = pipeline(class_label=[0, 1], num_frames=16, ar_step=5, seed=[0, 1])  # uint8 (2, 16, H, W, 3)
    """

    def __init__(
        self,
        vae: ARAutoencoder,
        dit: DiT,
        diffusion: DiffusionConfig,
        statistics: LatentStatistics,
        class_names: Sequence[str] = (),
        engine: EngineConfig | None = None,
    ) -> None:
        """``engine`` says how the fast executors compute; raises CheckpointError if the two models do not share the
        shape of their latents."""
        ours, theirs = (vae.config.num_tokens, vae.config.token_dim), (dit.config.num_tokens, dit.config.token_dim)
        if ours != theirs:
            raise CheckpointError(f"The AR-VAE has (L, D) = {ours} latents, the AR-DiT {theirs}: they do not fit.")
        self.vae, self.dit = vae.eval(), dit.eval()
        self.diffusion = diffusion
        self.statistics = statistics
        self.class_names = list(class_names)
        self.engine_config = engine or EngineConfig()

    @classmethod
    def from_pretrained(
        cls,
        uri: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        engine: EngineConfig | None = None,
    ) -> ARDiffusionPipeline:
        """Loads a folder written by :meth:`save_pretrained`, local or ``s3://``; ``dtype`` is that of the weights.

        Raises:
            CheckpointError: There is no complete pipeline, or its weights do not fit its configuration.
        """
        with local_folder(uri) as folder:
            config = read_config(folder, "ar-diffusion-pipeline")
            vae = make_autoencoder(build_config(AnyAutoencoderConfig, config["vae"]))
            dit = make_dit(build_config(AnyDiTConfig, config["dit"]))
            return cls(
                load_weights(vae, folder / "vae.safetensors"),
                load_weights(dit, folder / "dit.safetensors"),
                build_config(DiffusionConfig, config["diffusion"]),
                LatentStatistics(**config["latent_statistics"]),
                config["class_names"],
                engine,
            ).to(device, dtype)

    def save_pretrained(self, uri: str) -> None:
        """Writes ``config.json``, ``vae.safetensors`` and ``dit.safetensors`` to a folder, local or ``s3://``."""
        config = {
            "kind": "ar-diffusion-pipeline",
            "vae": to_dict(self.vae.config),
            "dit": to_dict(self.dit.config),
            "diffusion": to_dict(self.diffusion),
            "latent_statistics": asdict(self.statistics),
            "class_names": self.class_names,
        }
        modules = {"vae": dict(self.vae.named_parameters()), "dit": dict(self.dit.named_parameters())}
        write_model(uri, config, modules)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> ARDiffusionPipeline:
        """Moves both models, and changes the type of their weights if one is given."""
        self.vae.to(device, dtype)
        self.dit.to(device, dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.dit.parameters()).device

    def __call__(
        self,
        class_label: int | Sequence[int] | None = None,
        num_frames: int = 16,
        ar_step: int = 5,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        seed: int | Sequence[int] = 0,
        executor: Executor = "window",
        condition: Tensor | None = None,
        condition_at: Sequence[int] | None = None,
        on_frames: Callable[[int], None] = lambda final_frames: None,
    ) -> Tensor:
        """Generates videos; a video depends on its own label and seed, not on what it is generated with.

        Args:
            class_label: Class index or indices; None generates without a class.
            num_frames: F, given frames included. A video may be longer than the model sees at once.
            ar_step: The paper's timestep difference, from 0 (all frames together) to ``num_inference_steps`` (frame by
                frame).
            num_inference_steps: S.
            guidance_scale: Strength of classifier-free guidance; 1 is none.
            seed: Seed or seeds. Labels and seeds are paired; a single one goes with all of the others.
            executor: ``window``: a frame sees a window that moves along with it, finished frames are remembered.
                ``full``: the same result by evaluating every visible frame in every iteration, the plain reference.
                ``rolling``: each frame is evaluated once when clean and remembered; for models trained with
                ``attention_window``.
            condition: Given first frames, uint8 ``(k, H, W, 3)`` or ``(B, k, H, W, 3)``: one frame animates an image,
                several continue a clip. They come back as the AR-VAE reconstructs them.
            condition_at: Where the given frames are in the video; only ``0..k-1`` is possible.
            on_frames: Called with the number of final frames whenever it grows.

        Returns:
            uint8 ``(B, F, H, W, 3)`` on the CPU.

        Raises:
            ValueError: A label, a size, ``ar_step`` or the condition is out of range; the message says what is valid.
        """
        frames = []
        for frame in self.stream(
            class_label,
            num_frames,
            ar_step,
            num_inference_steps,
            guidance_scale,
            seed,
            executor,
            condition,
            condition_at,
        ):
            frames.append(frame)
            on_frames(len(frames))
        return torch.stack(frames, dim=1)

    def stream(
        self,
        class_label: int | Sequence[int] | None = None,
        num_frames: int = 16,
        ar_step: int = 5,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        seed: int | Sequence[int] = 0,
        executor: Executor = "window",
        condition: Tensor | None = None,
        condition_at: Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """Like calling the pipeline, but yields each frame, uint8 ``(B, H, W, 3)``, as soon as it is final.

        The first comes after ``num_inference_steps`` iterations, then one every ``ar_step``; memory does not grow with
        the number of frames (but for the latents of ``full``). Arguments are checked when the first frame is asked for.
        """
        cache = DecoderCache()
        for latents in self.stream_latents(
            class_label,
            num_frames,
            ar_step,
            num_inference_steps,
            guidance_scale,
            seed,
            executor,
            condition,
            condition_at,
        ):
            yield from self.decode(latents, cache)

    @torch.no_grad()
    def stream_latents(
        self,
        class_label: int | Sequence[int] | None = None,
        num_frames: int = 16,
        ar_step: int = 5,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        seed: int | Sequence[int] = 0,
        executor: Executor = "window",
        condition: Tensor | None = None,
        condition_at: Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """Like :meth:`stream`, but yields clean diffusion latents ``(B, n, L, D)`` of the n frames that became final,
        for :meth:`decode`."""
        if executor not in get_args(Executor):
            raise ValueError(f"executor must be one of {', '.join(get_args(Executor))}, got {executor!r}")
        labels, seeds = self._pair(class_label, seed)
        given = self.encode_condition(condition, condition_at, len(seeds), num_frames)
        if executor == "full":
            num_given = 0 if given is None else given.shape[1]
            schedule = ad_schedule(num_frames, num_inference_steps, ar_step, self.dit.config.num_frames, num_given)
            noise = initial_noise(seeds, num_frames, self.dit.config.num_tokens, self.dit.config.token_dim)
            denoise = guided_denoiser(
                self.dit, self.diffusion, torch.tensor(labels, device=self.device), guidance_scale
            )
            yield from stream_full(denoise, noise.to(self.device), schedule, self.diffusion, given)
            return
        room = max(self.engine_config.max_frames, num_frames * len(seeds))
        engine = self.engine(replace(self.engine_config, max_frames=room))
        request_id = engine.submit(
            SampleRequest(
                class_labels=tuple(labels),
                seeds=tuple(seeds),
                num_frames=num_frames,
                ar_step=ar_step,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                executor=executor,
                condition=given,
            )
        )
        try:
            if given is not None:
                yield given
            while engine.busy:
                for event in engine.step():
                    yield event.latents
        finally:
            engine.cancel(request_id)  # what a failure or a caller that stops asking would leave behind

    def engine(self, config: EngineConfig | None = None) -> SamplingEngine:
        """An engine that runs many requests on this model together; see :class:`SamplingEngine`."""
        return SamplingEngine(self.dit, self.diffusion, config or self.engine_config)

    @torch.no_grad()
    def decode(self, latents: Tensor, cache: DecoderCache) -> Iterator[Tensor]:
        """Diffusion latents ``(B, n, L, D)`` to n frames, uint8 ``(B, H, W, 3)``, going on from ``cache``."""
        for part in latents.split(max(1, MAX_DECODED // latents.shape[0]), dim=1):
            video = self.vae.decode(self.statistics.denormalise(part.to(self.vae_dtype)), cache)
            yield from to_uint8(video).cpu().unbind(dim=1)

    @property
    def vae_dtype(self) -> torch.dtype:
        """Type of the AR-VAE's weights."""
        return next(self.vae.parameters()).dtype

    def encode_condition(
        self, condition: Tensor | None, condition_at: Sequence[int] | None, videos: int, num_frames: int
    ) -> Tensor | None:
        """Given frames as diffusion latents ``(B, k, L, D)``, or None."""
        if condition is None:
            if condition_at is not None:
                raise ValueError("condition_at says where given frames are, but there is no condition")
            return None
        size = self.vae.config.resolution
        if condition.ndim == 4:
            condition = repeat(condition, "k h w c -> b k h w c", b=videos)
        if condition.dtype != torch.uint8 or condition.shape[0] != videos or condition.shape[2:] != (size, size, 3):
            raise ValueError(
                f"condition must be uint8 (k, {size}, {size}, 3) or ({videos}, k, {size}, {size}, 3), got "
                f"{condition.dtype} {tuple(condition.shape)}"
            )
        count = condition.shape[1]
        if not 1 <= count < num_frames:
            raise ValueError(f"{count} given frames leave nothing to generate of {num_frames}")
        if condition_at is not None and list(condition_at) != list(range(count)):
            raise ValueError(
                f"given frames can only be the first ones, 0..{count - 1}, not {list(condition_at)}: the model is "
                "causal, a frame never sees a later one, so it cannot be led towards a frame at the end or in between"
            )
        return self.statistics.normalise(self.vae.latents(to_unit(condition.to(self.device)).to(self.vae_dtype)))

    def _pair(self, class_label: int | Sequence[int] | None, seed: int | Sequence[int]) -> tuple[list[int], list[int]]:
        classes = self.dit.config.num_classes
        if class_label is None:
            labels = [self.dit.unlabelled]
        else:
            labels = [class_label] if isinstance(class_label, int) else list(class_label)
            for label in labels:
                if not 0 <= label < classes:
                    valid = f"0..{classes - 1}" if classes else "no class at all"
                    raise ValueError(f"class_label {label} is out of range: the model knows {valid}")
        seeds = [seed] if isinstance(seed, int) else list(seed)
        count = max(len(labels), len(seeds))
        if not count or {len(labels), len(seeds)} - {1, count}:
            raise ValueError(f"{len(labels)} class labels and {len(seeds)} seeds cannot be paired")
        labels, seeds = labels * (count // len(labels)), seeds * (count // len(seeds))
        return labels, seeds
