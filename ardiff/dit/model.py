"""The AR-DiT: a Diffusion Transformer with a timestep per frame and strictly causal attention along time (Sec. 3.2).

Shapes: B batch, F frames, N = B F packed frames, L tokens a frame, D latent width, C model width.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ardiff.dit.attention import after_condition, block_causal_mask, masked_attention
from ardiff.dit.blocks import DiTBlock, TimestepEmbedder, modulate
from ardiff.dit.condition import ConditionTokens, unmodulated_before
from ardiff.dit.config import DiTConfig
from ardiff.layers import Attend, init_linear, rotary, sincos_positions


class DiT(nn.Module):
    """Predicts clean latents (or noise, or velocity) from noisy ones: ``(B, F, L, D) -> (B, F, L, D)``."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.token_in = nn.Linear(config.token_dim, width)
        self.timestep_embedder = TimestepEmbedder(width)
        match config.condition:
            case "modulation":
                self.class_embedding = nn.Embedding(config.num_classes + 1, width)
            case "tokens":
                self.condition = ConditionTokens(config)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        if config.final_norm == "modulated":
            self.final_modulation = nn.Linear(width, 2 * width)
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.token_out = nn.Linear(width, config.token_dim)
        self.rotary_pairs = width // config.num_heads // 4 if config.positions == "rotary" else 0  # half of every head
        match config.positions:
            case "rotary":
                self.position_embedding = nn.Parameter(torch.zeros(1, config.num_tokens, width))
            case "sincos" | "table":
                table = sincos_positions(torch.arange(config.num_frames * config.num_tokens), width)
                table = rearrange(table, "(f l) c -> f l c", l=config.num_tokens)
                if config.positions == "table":
                    self.position_embedding = nn.Parameter(table)
                else:
                    self.register_buffer("position_embedding", table, persistent=False)
        mask = None
        if config.attention == "causal":
            mask = block_causal_mask(config.num_frames, config.num_tokens, config.attention_window)
        self.register_buffer("mask", mask, persistent=False)
        self.mask: Tensor | None
        self._initialise()

    def _initialise(self) -> None:
        self.apply(init_linear)
        # Wider than DiT's 0.02: the timestep's embedding grows fast and would hide the class in short runs.
        if self.config.condition == "modulation":
            nn.init.normal_(self.class_embedding.weight, std=0.5)
        for linear in (self.timestep_embedder.fc1, self.timestep_embedder.fc2):
            nn.init.normal_(linear.weight, std=0.02)
        if self.config.positions == "rotary":
            nn.init.normal_(self.position_embedding, std=0.02)
        for name, parameter in self.named_parameters():  # adaLN-zero: every block starts as the identity
            if "modulation" in name or name.startswith("token_out"):
                nn.init.zeros_(parameter)

    @property
    def null_class(self) -> int:
        """The class index that stands for "no class" in classifier-free guidance, as ``config.guidance_null`` says."""
        match self.config.guidance_null:
            case "learned":
                return self.config.num_classes
            case "zero":
                return self.config.num_classes + 1
            case "first_class":
                return 0

    @property
    def unlabelled(self) -> int:
        """The class index with which a video without a class is generated.

        It is the null class, unless that is zero condition tokens: then guidance leads away from those, towards the
        learned ones.
        """
        return self.config.num_classes if self.config.guidance_null == "zero" else self.null_class

    def forward(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Evaluates all frames of a clip.

        Args:
            latents: Noisy latents ``(B, F, L, D)``, ``F <= config.num_frames``.
            timesteps: int64 ``(B, F)``.
            condition: Class labels, int64 ``(B,)``: ``0..num_classes - 1``, :attr:`null_class` or :attr:`unlabelled`.
                With ``condition=tokens`` also the condition tokens themselves, float ``(B, N, condition_dim)``.

        Returns:
            The prediction, ``(B, F, L, D)``. With causal attention that of frame i depends on frames ``0..i`` only,
            unless condition tokens carry later frames to it (``condition_attention=all``).

        Raises:
            ValueError: More frames than the model has positions for, or condition tokens that it cannot take.
        """
        batch, frames = timesteps.shape
        if frames > self.config.num_frames:
            raise ValueError(f"the model sees at most {self.config.num_frames} frames at once, got {frames}")
        if self.config.condition == "tokens":
            return self._forward_after_condition(latents, timesteps, self.condition(condition))
        if condition.is_floating_point():
            raise ValueError("the model takes class labels: it was not trained with condition tokens")
        positions = repeat(torch.arange(frames, device=latents.device), "f -> (b f)", b=batch)  # (N,)
        labels = repeat(condition, "b -> (b f)", f=frames)  # (N,)
        modulations = self.modulations(timesteps.flatten(), labels)
        size = frames * self.config.num_tokens
        attend = masked_attention(None if self.mask is None else self.mask[:size, :size], frames)
        x = rearrange(latents, "b f l d -> (b f) l d")
        x = self.forward_frames(x, modulations, positions, [attend] * self.config.depth)  # (N, L, D)
        return rearrange(x, "(b f) l d -> b f l d", b=batch)

    def _forward_after_condition(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """:meth:`forward` as one sequence that begins with condition tokens ``(B, N, C)``."""
        frames, tokens, count = timesteps.shape[1], self.config.num_tokens, condition.shape[1]
        modulations = rearrange(self.modulations(timesteps.flatten()), "(b f) m -> b f m", f=frames)
        *parts, final = modulations.split(self._modulation_sizes, dim=-1)
        mask = None if self.mask is None else self.mask[: frames * tokens, : frames * tokens]
        if mask is not None:
            mask = after_condition(mask, count, self.config.condition_attention)
        x = self.token_in(latents) + self.position_embedding[:frames]  # (B, F, L, C)
        x = torch.cat([condition, rearrange(x, "b f l c -> b (f l) c")], dim=1)  # (B, N + F L, C)
        attend = masked_attention(mask, 1)
        for block, modulation in zip(self.blocks, parts, strict=True):
            x = block(x, unmodulated_before(modulation, count, tokens), None, attend)
        x = rearrange(x[:, count:], "b (f l) c -> (b f) l c", f=frames)
        return rearrange(self._finish(x, rearrange(final, "b f m -> (b f) 1 m")), "(b f) l d -> b f l d", f=frames)

    def modulations(self, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The adaLN shifts, scales and gates of packed frames: ``(N,), (N,) -> (N, 6 C depth + 2 C)``.

        They depend on nothing but timestep and class, so a sampler can tabulate them once for its template. With
        condition tokens they do not depend on the class; without a modulated final norm the ``2 C`` are missing.
        """
        condition = self.timestep_embedder(timesteps)  # (N, C)
        if self.config.condition == "modulation":
            condition = condition + self.class_embedding(class_labels)
        condition = nn.functional.silu(condition)
        parts = [block.modulation(condition) for block in self.blocks]  # type: ignore[operator]
        if self.config.final_norm == "modulated":
            parts.append(self.final_modulation(condition))
        return torch.cat(parts, dim=-1)

    @property
    def modulation_width(self) -> int:
        """Numbers of :meth:`modulations` for a frame."""
        return sum(self._modulation_sizes)

    @property
    def _modulation_sizes(self) -> list[int]:
        """Channels of the modulations of each block, and of the final norm."""
        final = 2 * self.config.width if self.config.final_norm == "modulated" else 0
        return [6 * self.config.width] * self.config.depth + [final]

    def forward_frames(self, latents: Tensor, modulations: Tensor, positions: Tensor, attend: list[Attend]) -> Tensor:
        """Evaluates packed frames, which may belong to different videos.

        Args:
            latents: ``(N, L, D)``.
            modulations: ``(N, 6 C depth + 2 C)`` from :meth:`modulations`.
            positions: int64 ``(N,)``, the index of each frame in what the model takes for the clip.
            attend: For each block, the function that mixes tokens; it alone knows which frame may see which.

        Returns:
            The prediction, ``(N, L, D)``.
        """
        x = self.token_in(latents) + self._embed_positions(positions)  # (N, L, C)
        rotation = rotary(positions, self.rotary_pairs, x.dtype) if self.rotary_pairs else None
        *parts, final = modulations[:, None].split(self._modulation_sizes, dim=-1)
        for block, modulation, mix in zip(self.blocks, parts, attend, strict=True):
            x = block(x, modulation, rotation, mix)  # (N, L, C)
        return self._finish(x, final)  # (N, L, D)

    def _finish(self, x: Tensor, modulation: Tensor) -> Tensor:
        """The final norm and layer, ``(N, L, C)`` -> ``(N, L, D)``; ``modulation (N, 1, 2 C)``, or empty."""
        x = self.final_norm(x)
        if self.config.final_norm == "modulated":
            x = modulate(x, *modulation.chunk(2, dim=-1))
        return self.token_out(x)

    def _embed_positions(self, positions: Tensor) -> Tensor:
        if self.config.positions == "rotary":
            return self.position_embedding
        return self.position_embedding[positions]
