"""Configuration of the AR-DiT, and of low-rank adapters for it."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTConfig:
    """Sizes and options of the AR-DiT. The defaults are the paper's (Table 6)."""

    kind: Literal["standard"] = "standard"
    """Kind of model: ``standard``, or ``upstream`` for the authors' checkpoints, which has options of its own."""
    num_frames: int = 16
    """Frames that the model sees at once: the longest training clip and the largest sampling window."""
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
    """Number of classes; 0 is an unconditional model. Index ``num_classes`` is the null class of guidance."""
    num_shapes: int = field(default=1, metadata={"omit_default": True})
    """Shapes of frames, those of the AR-VAE. Latent tokens do not tell the shape, so the model is told: with several,
    each has an embedding that is added to that of the timestep. Set by ``ardiff train-dit``."""
    positions: Literal["rotary", "sincos"] = "rotary"
    """``rotary``: rotary embedding of the frame index on half of every head, plus a learned embedding of the token
    index. ``sincos``: fixed sine-cosine embeddings of all F L tokens, bound to ``num_frames``."""
    attention: Literal["causal", "bidirectional"] = "causal"
    """``causal``: a frame never sees a later one; fast sampling, streaming and continuation need it.
    ``bidirectional``: every frame sees every other, for ablations; only ``mode=full`` can sample such a model."""
    attention_window: int | None = None
    """If set, a frame sees only itself and the ``attention_window - 1`` frames before it. ``mode=rolling`` needs this
    band mask."""
    condition: Literal["modulation", "tokens", "cross_attention"] = "modulation"
    """``modulation``: the class embedding is added to the timestep embedding, which modulates each block. ``tokens``:
    each class is a sequence of condition tokens before the first frame, which every frame sees. ``cross_attention``:
    text, which every block reads with a cross-attention layer; a class acts by modulation."""
    condition_tokens: int = 0
    """Learned condition tokens per class. 0: the model has none, and the caller passes condition tokens."""
    condition_dim: int = 768
    """Width of a condition token, or of the text encoder's token states."""

    def __post_init__(self) -> None:
        if min(self.num_frames, self.num_tokens, self.token_dim, self.width, self.depth, self.num_heads) < 1:
            raise ValueError("num_frames, num_tokens, token_dim, width, depth and num_heads must be at least 1")
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(f"width {self.width} must be an even multiple of num_heads {self.num_heads}")
        if self.positions == "rotary" and self.width < 4 * self.num_heads:
            raise ValueError("positions=rotary rotates half of every head in pairs: heads must be at least 4 wide")
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, got {self.num_classes}")
        if self.num_shapes < 1:
            raise ValueError(f"num_shapes must be at least 1, got {self.num_shapes}")
        if self.num_shapes > 1 and self.condition == "tokens":
            raise ValueError("condition=tokens takes frames of one shape only: use modulation or cross_attention")
        if self.attention_window is not None and not 1 <= self.attention_window <= self.num_frames:
            raise ValueError(
                f"attention_window must be in 1..num_frames ({self.num_frames}), got {self.attention_window}"
            )
        if self.attention_window is not None and self.attention == "bidirectional":
            raise ValueError("attention_window is a band of causal attention: unset it with attention=bidirectional")
        if self.condition_tokens < 0 or self.condition_dim < 1:
            raise ValueError("condition_tokens must be 0 or more, condition_dim at least 1")
        if self.condition_tokens and self.condition != "tokens":
            raise ValueError("condition_tokens is for condition=tokens only")
        if self.condition == "tokens" and self.positions == "rotary":
            raise ValueError("condition=tokens needs positions=sincos: condition tokens have no rotary position")

    @property
    def prefix_tokens(self) -> int:
        """Condition tokens before the first frame, M; 0 for other kinds of conditions."""
        return self.condition_tokens if self.condition == "tokens" else 0

    @property
    def text(self) -> bool:
        """Whether the model takes text."""
        return self.condition == "cross_attention"

    @property
    def causal(self) -> bool:
        """Whether no frame sees a later one. Then keys and values of finished frames can be cached."""
        return self.attention == "causal"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig:
    """A low-rank adapter, which is trained while the AR-DiT's own weights stay as they are."""

    rank: int = 0
    """Rank of the adapter; 0 trains the whole model."""
    alpha: float = 16.0
    """The update of a layer is multiplied by ``alpha / rank``."""
    layers: tuple[Literal["qkv", "proj", "fc1", "fc2", "q", "kv", "modulation"], ...] = ("qkv", "proj", "fc1", "fc2")
    """Linear layers of every block that are adapted: ``qkv`` and ``proj`` of attention, ``fc1`` and ``fc2`` of the MLP,
    ``q`` and ``kv`` of attention to text, and ``modulation``."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank must be 0 or more, got {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not self.layers:
            raise ValueError("layers must name at least one linear layer")

    @property
    def scale(self) -> float:
        """The factor of every update."""
        return self.alpha / self.rank
