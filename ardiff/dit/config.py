"""Configuration of the AR-DiT."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTConfig:
    """Sizes and choices of the AR-DiT. The defaults are the paper's (Table 6)."""

    num_frames: int = 16
    """Frames that the model sees at once: the longest training clip and the largest window in sampling."""
    num_tokens: int = 32
    """Latent tokens per frame, L."""
    token_dim: int = 4
    """Width of a latent token, D."""
    width: int = 1152
    """Hidden width."""
    depth: int = 28
    """Number of blocks."""
    num_heads: int = 16
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the model width."""
    num_classes: int = 0
    """Classes of the data; 0 is an unconditional model. Index ``num_classes`` is the null class of guidance."""
    positions: Literal["rotary", "sincos", "table"] = "rotary"
    """``rotary``: half of every head turns with the frame index, plus a learned embedding of the token index.
    ``sincos``: fixed embeddings over all F L tokens, as the authors do; bound to ``num_frames``. ``table``: the same
    at the start, but among the weights, where the authors' checkpoints have them."""
    attention: Literal["causal", "bidirectional"] = "causal"
    """``causal``: a frame never sees a later one, which fast sampling, streaming and continuation rest on.
    ``bidirectional``: every frame sees every other; for ablations, sampled in mode ``full`` only."""
    attention_window: int | None = None
    """If set, a frame attends to itself and the ``attention_window - 1`` frames before it only: the band mask that the
    sampling mode ``rolling`` needs."""
    condition: Literal["modulation", "tokens"] = "modulation"
    """``modulation``: the class is added to the timestep's embedding, which shifts, scales and gates. ``tokens``: it
    is a row of condition tokens before the first frame, which every frame reads, as in the authors' checkpoints."""
    condition_tokens: int = 0
    """Learned condition tokens of each class, N; 0 leaves it to the caller to give condition tokens."""
    condition_dim: int = 768
    """Width of a condition token."""
    condition_attention: Literal["self", "all"] = "self"
    """What condition tokens see: ``self``: themselves only, so that the model is causal. ``all``: every frame too, as
    in the authors' checkpoints; earlier frames then see later ones through them. With ``attention=bidirectional``
    there is no mask, and they see everything."""
    guidance_null: Literal["learned", "zero", "first_class"] = "learned"
    """What "no class" means to classifier-free guidance: ``learned``: an embedding of its own, row ``num_classes``.
    ``zero``: condition tokens that are zero (the authors' models without classes, whose guidance leads away from them).
    ``first_class``: class 0 doubles as it (the authors' models with classes)."""
    residual: Literal["plain", "normed"] = "plain"
    """``normed``: a block's norms overwrite what its attention and MLP are added to, as in the authors' checkpoints."""
    final_norm: Literal["modulated", "plain"] = "modulated"
    """Whether the last norm is shifted and scaled by timestep and class; in the authors' checkpoints it is not."""

    def __post_init__(self) -> None:
        if min(self.num_frames, self.num_tokens, self.token_dim, self.width, self.depth, self.num_heads) < 1:
            raise ValueError("num_frames, num_tokens, token_dim, width, depth and num_heads must be at least 1")
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(f"width {self.width} must be an even multiple of num_heads {self.num_heads}")
        if self.positions == "rotary" and self.width < 4 * self.num_heads:
            raise ValueError("positions=rotary turns half of every head, in pairs: heads must be at least 4 wide")
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, got {self.num_classes}")
        if self.attention_window is not None and not 1 <= self.attention_window <= self.num_frames:
            raise ValueError(
                f"attention_window must be in 1..num_frames ({self.num_frames}), got {self.attention_window}"
            )
        if self.attention_window is not None and self.attention == "bidirectional":
            raise ValueError(
                "attention_window is a band of causal attention: leave it out with attention=bidirectional"
            )
        if self.condition_tokens < 0 or self.condition_dim < 1:
            raise ValueError("condition_tokens must be 0 or more, condition_dim at least 1")
        if self.condition == "tokens" and self.positions == "rotary":
            raise ValueError("condition=tokens needs positions=sincos or table: condition tokens are not rotated")
        if self.condition == "modulation" and (
            self.condition_tokens or self.condition_attention == "all" or self.guidance_null == "zero"
        ):
            raise ValueError(
                "condition_tokens, condition_attention=all and guidance_null=zero are for condition=tokens only"
            )
        if self.guidance_null == "first_class" and not self.num_classes:
            raise ValueError("guidance_null=first_class needs a model with classes")
