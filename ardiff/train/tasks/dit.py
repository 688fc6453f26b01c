"""The AR-DiT's training task.

Shapes: B batch, F frames, H W pixels, L tokens, D latent width, M text tokens, E their width,
K openings of a clip, O frames of an opening.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from einops import repeat
from torch import Tensor, nn

from ardiff.data.latents import LatentStatistics
from ardiff.data.transforms import to_uint8
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.guidance import with_context
from ardiff.diffusion.loss import diffusion_loss, loss_breakdown
from ardiff.diffusion.noise import q_sample
from ardiff.diffusion.prediction import prediction_target
from ardiff.diffusion.timestep_sampling import sample_timesteps
from ardiff.dit import DiT, TextTokens
from ardiff.errors import TrainingError
from ardiff.randomness import BatchGenerator
from ardiff.sampling.full import stream_request
from ardiff.sampling.params import ModelInfo, SamplingParams, expand_params, validate
from ardiff.sampling.request import SampleRequest
from ardiff.tensors import to_device
from ardiff.train.tasks.base import Batch, Task
from ardiff.train.tasks.config import DiTTaskConfig


class DiTTask(Task):
    """Denoises latents. Batches hold ``latents`` float32 ``(B, F, L, D)`` and ``label`` int64 ``(B,)``.

    The latents are as encoded, not normalised. With ``encode``, batches hold ``video`` uint8 ``(B, F, H, W, 3)``
    instead of latents. A model without classes ignores the labels. For a model with text they also hold ``text``
    float32 ``(B, M, E)`` and ``text_mask`` bool ``(B, M)``, whose rows without any True are clips without text; for a
    model with several shapes of frames ``shape`` int64 ``(B,)``, of which the part of the clips is logged.
    """

    sampling = SamplingParams(num_inference_steps=20, ar_step=2, mode="full")
    """Parameters of :meth:`samples`."""

    def __init__(
        self,
        model: DiT,
        config: DiTTaskConfig,
        diffusion: DiffusionConfig,
        statistics: LatentStatistics,
        decode: Callable[[Tensor], Tensor] | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model: DiT = model
        self.config = config
        self.diffusion = diffusion
        self.statistics = statistics
        self.alphas_cumprod = diffusion.alphas_cumprod()
        self.decode = decode
        self.encode = encode

    def loss(self, batch: Batch, step: int, draws: BatchGenerator) -> tuple[Tensor, dict[str, Tensor]]:
        x0 = self._clean(batch)  # (B, F, L, D)
        size, frames = x0.shape[:2]
        kind, count = self.diffusion.timestep_sampling, self.diffusion.num_timesteps
        timesteps = sample_timesteps(kind, size, frames, count, draws.generators(size))  # (B, F)
        eps = self._noise(x0, draws)  # (B, F, L, D)
        labels = self._labels(batch, draws)  # (B,)
        text = self._text(batch, draws) if self.model.config.text else None
        forced = self._forced(size, draws)  # (B,)
        if self.config.teacher_forcing:
            independent = sample_timesteps("independent", size, frames, count, draws.generators(size))  # (B, F)
            timesteps = torch.where(forced[:, None], independent, timesteps)  # (B, F)
        timesteps = to_device(timesteps, x0.device)
        x_t = q_sample(x0, eps, timesteps, self.alphas_cumprod)  # (B, F, L, D)
        output = self._evaluate(x0, x_t, timesteps, labels, text, forced)  # (B, F, L, D)
        target = prediction_target(self.diffusion.prediction, x0, eps, x_t, timesteps, self.alphas_cumprod)
        loss = diffusion_loss(output, target)
        breakdown = loss_breakdown(output, target, timesteps, self.diffusion.num_timesteps)
        logged = {"mean_timestep": timesteps.float().mean(), **breakdown, **self.length_shares(x0)}
        if self.config.openings:
            opening = x0[:, : self.config.opening_frames]  # (B, O, L, D)
            logged["loss_openings"] = self._loss_of_openings(opening, labels, text, draws)
            loss = loss + logged["loss_openings"]
        if "shape" in batch:
            shapes = range(self.model.config.num_shapes)
            logged |= {f"share_shape_{i}": (batch["shape"] == i).float().mean() for i in shapes}
        return loss, logged

    def _forced(self, size: int, draws: BatchGenerator) -> Tensor:
        """Which of the local clips train under teacher forcing: evenly spread over the whole batch. Bool ``(B,)`` on
        the CPU, so that no GPU is waited for."""
        index = torch.arange(draws.first, draws.first + size + 1)
        return (index.double() * self.config.teacher_forcing).floor().diff() > 0

    def _evaluate(
        self, x0: Tensor, x_t: Tensor, timesteps: Tensor, labels: Tensor, text: TextTokens | None, forced: Tensor
    ) -> Tensor:
        """The model's output for noisy latents ``x_t (B, F, L, D)``.

        In ``forced`` clips, bool ``(B,)``, each frame sees the frames of ``x0`` before it instead of those of ``x_t``.
        """
        if not self.config.teacher_forcing:
            return self.model(x_t, timesteps, labels, text)
        outputs, order = [], []
        for teacher_forcing in (True,) if self.config.teacher_forcing == 1.0 else (True, False):
            rows = (forced == teacher_forcing).nonzero().flatten()  # b clips
            # Without such clips here, another one is evaluated for nothing: ZeRO 3 needs equal calls on all ranks.
            shown = to_device(rows if len(rows) else rows.new_zeros(1), x_t.device)
            latents, levels = x_t[shown], timesteps[shown]  # (b, F, L, D), (b, F)
            if teacher_forcing:
                latents, levels = with_context(x0[shown], latents, levels, self.diffusion)  # (b, 2 F, L, D), (b, 2 F)
            of_text = None if text is None else replace(text, index=text.index[shown])
            output = self.model(latents, levels, labels[shown], of_text, teacher_forcing=teacher_forcing)
            outputs.append(output[: len(rows)])  # (b, F, L, D)
            order.append(rows)
        return torch.cat(outputs)[to_device(torch.cat(order).argsort(), x_t.device)]  # (B, F, L, D)

    def _loss_of_openings(
        self, opening: Tensor, labels: Tensor, text: TextTokens | None, draws: BatchGenerator
    ) -> Tensor:
        """The loss of further noisy versions of the clips' first frames ``opening (B, O, L, D)``."""
        size, frames = opening.shape[:2]
        kind, steps, count = self.diffusion.timestep_sampling, self.diffusion.num_timesteps, self.config.openings
        x0, labels, text = repeated(opening, labels, text, count)  # (B, K, O, L, D), (B K,)
        eps = self._noise(x0, draws)  # (B, K, O, L, D)
        drawn = [sample_timesteps(kind, size, frames, steps, draws.generators(size)) for _ in range(count)]
        timesteps = to_device(torch.stack(drawn, dim=1).flatten(0, 1), x0.device)  # (B K, O)
        x0, eps = x0.flatten(0, 1), eps.flatten(0, 1)  # (B K, O, L, D)
        x_t = q_sample(x0, eps, timesteps, self.alphas_cumprod)
        output = self.model(x_t, timesteps, labels, text)
        target = prediction_target(self.diffusion.prediction, x0, eps, x_t, timesteps, self.alphas_cumprod)
        return diffusion_loss(output, target)

    def _clean(self, batch: Batch) -> Tensor:
        """Normalised clean latents of the batch, ``(B, F, L, D)``."""
        return self.statistics.normalise(batch["latents"] if self.encode is None else self.encode(batch["video"]))

    def _noise(self, like: Tensor, draws: BatchGenerator) -> Tensor:
        """Noise with the shape of ``like (B, F, L, D)``, clamped if the configuration says so."""
        eps = to_device(draws(len(like), lambda g: torch.randn(like.shape[1:], generator=g)), like.device)
        return eps.clamp(-self.config.noise_clip, self.config.noise_clip) if self.config.noise_clip else eps

    def _labels(self, batch: Batch, draws: BatchGenerator) -> Tensor:
        """The labels ``(B,)`` that the model takes: of classes, some replaced by the null class, and of shapes."""
        labels = batch["label"]
        uniform = draws(len(labels), lambda g: torch.rand((), generator=g))  # (B,)
        if self.model.config.num_classes == 0:
            labels = torch.full_like(labels, self.model.unlabelled)
        dropped = to_device(uniform < self.config.class_dropout, labels.device)  # (B,)
        return self.model.label(torch.where(dropped, self.model.null_class, labels), batch.get("shape", 0))

    def _text(self, batch: Batch, draws: BatchGenerator) -> TextTokens:
        """The text of the clips, some of it dropped. Raises TrainingError if the batch has none."""
        if "text" not in batch:
            raise TrainingError(
                "the model takes text (dit.condition=cross_attention), but the training data has none: encode the "
                "captions with `ardiff encode`, or train with another dit.condition"
            )
        states, mask = batch["text"], batch["text_mask"]
        uniform = draws(len(states), lambda g: torch.rand((), generator=g))  # (B,)
        return TextTokens.of_videos(states, mask, to_device(uniform < self.config.text_dropout, states.device))

    @torch.no_grad()
    def samples(self, model: nn.Module) -> Tensor | None:
        """One video for each of the first 8 classes, with seeds 0, 1, ... and no text."""
        if self.decode is None:
            return None
        assert isinstance(model, DiT)
        params = replace(self.sampling, num_frames=model.config.num_frames)
        params = validate(params, ModelInfo.from_configs(model.config, self.diffusion))
        videos = range(min(max(model.config.num_classes, 1), 8))
        labels = [n if model.config.num_classes else None for n in videos]
        request = SampleRequest(videos=tuple(expand_params(params, class_label=labels, seed=list(videos))))
        latents = torch.cat(list(stream_request(model, self.diffusion, request)), dim=1)
        return to_uint8(self.decode(self.statistics.denormalise(latents))).cpu()


def repeated(
    x0: Tensor, labels: Tensor, text: TextTokens | None, count: int
) -> tuple[Tensor, Tensor, TextTokens | None]:
    """Each clip ``count`` times: latents ``(B, ...)`` as ``(B, K, ...)``, the labels ``(B K,)`` and the text."""
    if text is not None:
        text = replace(text, index=text.index.repeat_interleave(count))
    return repeat(x0, "b ... -> b k ...", k=count), labels.repeat_interleave(count), text
