"""The AR-DiT: a Diffusion Transformer with a timestep per frame and causal attention along time (Sec. 3.2).

Shapes: B videos, F frames, N = B F packed frames, L tokens per frame, D latent width, C model width, M condition or
text tokens, P prompts, H heads, K head width.
"""

from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ardiff.dit.attention import (
    block_causal_mask,
    masked_attention,
    prepend_condition,
    teacher_forcing_mask,
    text_attention,
)
from ardiff.dit.blocks import DiTBlock, FinalLayer, TextBlock, TimestepEmbedder
from ardiff.dit.condition import (
    ConditionTokens,
    TextEmbedder,
    TextTokens,
    modulate_frames_only,
    neutral_modulation,
)
from ardiff.dit.config import DiTConfig
from ardiff.layers import Attend, AttendText, attend_within_frame, init_linear, rotary, sincos_positions


class DiT(nn.Module):
    """Predicts clean latents (or noise, or velocity) from noisy ones: ``(B, F, L, D) -> (B, F, L, D)``."""

    block_class: type[DiTBlock] = DiTBlock
    final_layer_class: type[FinalLayer] = FinalLayer
    condition_class: type[ConditionTokens] = ConditionTokens
    mask: Tensor | None

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
                self.condition = self.condition_class(config)
            case "cross_attention":
                self.class_embedding = nn.Embedding(config.num_classes + 1, width)
                self.text_embedder = TextEmbedder(config)
        if config.num_shapes > 1:
            self.shape_embedding = nn.Embedding(config.num_shapes, width)
        block_class = TextBlock if config.text else self.block_class
        self.blocks = nn.ModuleList(block_class(config) for _ in range(config.depth))
        self.final_layer = self.final_layer_class(config)
        self.rotary_pairs = width // config.num_heads // 4 if config.positions == "rotary" else 0  # half of every head
        match config.positions:
            case "rotary":
                self.position_embedding = nn.Parameter(torch.zeros(1, config.num_tokens, width))
            case "sincos":
                table = sincos_positions(torch.arange(config.num_frames * config.num_tokens), width)
                table = rearrange(table, "(f l) c -> f l c", l=config.num_tokens)
                self.register_buffer("position_embedding", table, persistent=False)
        mask = None
        if config.attention == "causal":
            mask = block_causal_mask(config.num_frames, config.num_tokens, config.attention_window)
        self.register_buffer("mask", mask, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        self.apply(init_linear)
        # Wider than DiT's 0.02: the timestep embedding grows fast and would hide the class in short runs.
        if self.config.condition != "tokens":
            nn.init.normal_(self.class_embedding.weight, std=0.5)
        if self.config.num_shapes > 1:
            nn.init.normal_(self.shape_embedding.weight, std=0.5)
        for linear in (self.timestep_embedder.fc1, self.timestep_embedder.fc2):
            nn.init.normal_(linear.weight, std=0.02)
        if self.config.positions == "rotary":
            nn.init.normal_(self.position_embedding, std=0.02)
        for name, parameter in self.named_parameters():  # adaLN-zero: every block starts as the identity
            if "modulation" in name or "text_attention.proj" in name or name.startswith("final_layer"):
                nn.init.zeros_(parameter)

    @property
    def null_class(self) -> int:
        """The class label that means "no class" in classifier-free guidance."""
        return self.config.num_classes

    @property
    def unlabelled(self) -> int:
        """The class label with which a video without a class is generated."""
        return self.null_class

    def label(self, index: Tensor | int, shape: Tensor | int) -> Any:
        """The label of the class ``index`` in frames of a shape: one integer, so that each sequence still has one."""
        return index + shape * (self.config.num_classes + 1)

    def without_class(self, labels: Tensor) -> Tensor:
        """Labels of the same shapes with the null class, for classifier-free guidance."""
        if self.config.num_shapes == 1:
            return torch.full_like(labels, self.null_class)
        return self.label(self.null_class, labels // (self.config.num_classes + 1))

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        condition: Tensor,
        text: TextTokens | None = None,
        teacher_forcing: bool = False,
    ) -> Tensor:
        """Evaluates all frames of a clip.

        Args:
            latents: Noisy latents ``(B, F, L, D)``, ``F <= config.num_frames``.
            timesteps: int64 ``(B, F)``.
            condition: Class labels, int64 ``(B,)``: ``0..num_classes - 1``, :attr:`null_class` or :attr:`unlabelled`;
                with several shapes, what :meth:`label` makes of them. With ``condition=tokens`` also condition tokens,
                float ``(B, M, condition_dim)``; without them also labels per frame, ``(B, F)``.
            text: With ``condition=cross_attention``, the prompt of each video or frame; None is no text.
            teacher_forcing: The first half of the frames is clean, the second half are noisy frames at the same
                positions, each of which sees itself and the clean frames before it; see
                :func:`~ardiff.dit.attention.teacher_forcing_mask`.

        Returns:
            The prediction, ``(B, F, L, D)``. If ``config.causal``, frame i depends on frames ``0..i`` only. With
            ``teacher_forcing`` that of the noisy frames, ``(B, F / 2, L, D)``.

        Raises:
            ValueError: More frames than the model has positions for, condition tokens or text that it does not take,
                or teacher forcing of a model in which frames see later ones.
        """
        frames = timesteps.shape[1]
        length = frames // 2 if teacher_forcing else frames  # of the clip
        if length > self.config.num_frames:
            raise ValueError(f"the model sees at most {self.config.num_frames} frames at once, got {length}")
        if teacher_forcing and not self.config.causal:
            raise ValueError("teacher forcing needs a model in which no frame sees a later one")
        position = torch.arange(length, device=latents.device).repeat(frames // length)  # (F,)
        mask = self._teacher_forcing_mask(length) if teacher_forcing else self._mask(frames)
        output = self._evaluate(latents, timesteps, condition, text, position, mask)
        return output[:, length:] if teacher_forcing else output

    def _evaluate(
        self,
        latents: Tensor,
        timesteps: Tensor,
        condition: Tensor,
        text: TextTokens | None,
        position: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """:meth:`forward` of frames at ``position (F,)`` that see what ``mask (F L, F L)`` says; None is everything."""
        batch, frames = timesteps.shape
        if text is not None and not self.config.text:
            raise ValueError("the model takes no text: it was not trained with dit.condition=cross_attention")
        if self.config.condition == "tokens":
            return self._evaluate_with_condition(latents, timesteps, self.condition(condition), position, mask)
        if condition.is_floating_point():
            raise ValueError("the model takes class labels: it was not trained with condition tokens")
        positions = repeat(position, "f -> (b f)", b=batch)  # (N,)
        labels = repeat(condition, "b -> (b f)", f=frames) if condition.ndim == 1 else condition.flatten()  # (N,)
        modulations = self.modulations(timesteps.flatten(), labels)  # (N, 6 C depth + 2 C)
        attend = masked_attention(mask, frames)
        x = rearrange(latents, "b f l d -> (b f) l d")  # (N, L, D)
        attend_text = self._text_attention(text, batch, frames) if self.config.text else None
        x = self.forward_frames(x, modulations, positions, [attend] * self.config.depth, attend_text)  # (N, L, D)
        return rearrange(x, "(b f) l d -> b f l d", b=batch)

    def _evaluate_with_condition(
        self, latents: Tensor, timesteps: Tensor, condition: Tensor, position: Tensor, mask: Tensor | None
    ) -> Tensor:
        """:meth:`_evaluate` over one sequence: condition tokens ``(B, M, C)``, then all frames."""
        frames, num_tokens, num_condition = timesteps.shape[1], self.config.num_tokens, condition.shape[1]
        modulations = rearrange(self.modulations(timesteps.flatten()), "(b f) m -> b f m", f=frames)
        *of_blocks, of_final = modulations.split(self._modulation_widths, dim=-1)  # (B, F, 6 C) each, (B, F, 2 C)
        attend = masked_attention(None if mask is None else self.condition_mask(mask, num_condition), 1)
        x = self.token_in(latents) + self.position_embedding[position]  # (B, F, L, C)
        x = torch.cat([condition, rearrange(x, "b f l c -> b (f l) c")], dim=1)  # (B, M + F L, C)
        for block, modulation in zip(self.blocks, of_blocks, strict=True):
            x = block(x, modulate_frames_only(modulation, num_condition, num_tokens), None, attend)
        x = rearrange(x[:, num_condition:], "b (f l) c -> (b f) l c", f=frames)  # (N, L, C)
        x = self.final_layer(x, rearrange(of_final, "b f m -> (b f) 1 m"))  # (N, L, D)
        return rearrange(x, "(b f) l d -> b f l d", f=frames)

    def forward_frames(
        self,
        latents: Tensor,
        modulations: Tensor,
        positions: Tensor,
        attend: list[Attend],
        attend_text: list[AttendText] | None = None,
    ) -> Tensor:
        """Evaluates packed frames, which may belong to different videos.

        Args:
            latents: ``(N, L, D)``.
            modulations: ``(N, 6 C depth + 2 C)`` from :meth:`modulations`.
            positions: int64 ``(N,)``, the index of each frame in its clip.
            attend: For each block, the attention function; it alone knows which frame may see which.
            attend_text: For each block of a model with text, the function that attends to the text of each frame.

        Returns:
            The prediction, ``(N, L, D)``.
        """
        rotary_positions = self.config.positions == "rotary"
        x = self.token_in(latents)  # (N, L, C)
        x = x + (self.position_embedding if rotary_positions else self.position_embedding[positions])
        rotation = rotary(positions, self.rotary_pairs, x.dtype) if rotary_positions else None
        *of_blocks, of_final = modulations[:, None].split(self._modulation_widths, dim=-1)  # (N, 1, 6 C) each
        attention = list(zip(attend, *([attend_text] if attend_text is not None else []), strict=True))
        for block, modulation, of_block in zip(self.blocks, of_blocks, attention, strict=True):
            x = block(x, modulation, rotation, *of_block)  # (N, L, C)
        return self.final_layer(x, of_final)  # (N, L, D)

    def condition_keys_values(self, condition: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values ``(B, H, M, K)`` in each block of condition tokens that see only one another.

        They depend on no frame and no timestep, so a sampler can compute them once.

        Args:
            condition: Class labels, int64 ``(B,)``, or condition tokens, float ``(B, M, condition_dim)``.
        """
        x = self.condition(condition)  # (B, M, C)
        modulation = neutral_modulation(x, self.config.width)[None, None]  # (1, 1, 6 C)
        keys_values: list[tuple[Tensor, Tensor]] = []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys_values.append((k, v))
            return attend_within_frame(q, k, v)

        for block in self.blocks:
            x = block(x, modulation, None, attend)  # (B, M, C)
        return keys_values

    def text_keys_values(self, states: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Keys and values ``(P, H, M, K)`` of prompts in each block, from token states ``(P, M, E)``; None is no text,
        P = M = 1. They depend on nothing else, so a sampler can compute them once."""
        embedded = self.text_embedder(states)  # (P, M, C)
        of_blocks = []
        for block in self.blocks:
            assert isinstance(block, TextBlock)
            of_blocks.append(block.text_attention.keys_values(embedded))
        return of_blocks

    def _text_attention(self, text: TextTokens | None, batch: int, num_frames: int) -> list[AttendText]:
        """For each block, attention to the prompts of ``batch`` videos; no text is a further prompt, the last one."""
        null = self.text_keys_values(None)
        if text is None:
            device = null[0][0].device
            index, mask = torch.zeros(batch, dtype=torch.int64, device=device), torch.ones(1, 1, device=device).bool()
            return [text_attention(keys, values, mask, index, num_frames) for keys, values in null]
        length = text.mask.shape[1]
        first = torch.arange(length, device=text.mask.device)[None] == 0  # (1, M)
        mask = torch.cat([text.mask, first])  # (P + 1, M)
        attention = []
        for of_prompts, of_null in zip(self.text_keys_values(text.states), null, strict=True):
            keys, values = (
                torch.cat([t, repeat(n, "1 h 1 k -> 1 h m k", m=length)])  # (P + 1, H, M, K)
                for t, n in zip(of_prompts, of_null, strict=True)
            )
            attention.append(text_attention(keys, values, mask, text.index, num_frames))
        return attention

    def modulations(self, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The adaLN shifts, scales and gates of packed frames: ``(N,), (N,) -> (N, 6 C depth + 2 C)``.

        They depend on timestep and class only (with condition tokens on the timestep only), so a sampler can compute
        them once for all its timesteps.
        """
        condition = self.timestep_embedder(timesteps)  # (N, C)
        if self.config.condition != "tokens":
            assert class_labels is not None
            condition = condition + self._embed(class_labels)
        condition = nn.functional.silu(condition)
        layers = (*self.blocks, self.final_layer)
        return torch.cat([layer.modulation(condition) for layer in layers], dim=-1)

    def _embed(self, labels: Tensor) -> Tensor:
        """The embedding of classes, and of shapes if there are several: ``(N,) -> (N, C)``."""
        if self.config.num_shapes == 1:
            return self.class_embedding(labels)
        classes = self.config.num_classes + 1
        return self.class_embedding(labels % classes) + self.shape_embedding(labels // classes)

    @property
    def modulation_width(self) -> int:
        """Channels of :meth:`modulations`."""
        return sum(self._modulation_widths)

    @property
    def _modulation_widths(self) -> list[int]:
        """Channels of the modulations of each block and of the final layer."""
        return [layer.modulation_width for layer in (*self.blocks, self.final_layer)]

    def _mask(self, num_frames: int) -> Tensor | None:
        """The attention mask of the first F frames, ``(F L, F L)``; None if attention is bidirectional."""
        size = num_frames * self.config.num_tokens
        return None if self.mask is None else self.mask[:size, :size]

    def _teacher_forcing_mask(self, num_frames: int) -> Tensor:
        """The mask of a clip of F clean and F noisy frames, ``(2 F L, 2 F L)``."""
        device, window = self.token_in.weight.device, self.config.attention_window
        return teacher_forcing_mask(num_frames, self.config.num_tokens, window, device)

    def condition_mask(self, mask: Tensor, num_condition: int) -> Tensor:
        """The mask of a sequence that starts with M condition tokens, ``(F L, F L) -> (M + F L, M + F L)``."""
        return prepend_condition(mask, num_condition)
