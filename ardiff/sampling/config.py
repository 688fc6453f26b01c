"""Configuration of the sampling engine."""

from dataclasses import dataclass
from typing import Literal

AttentionBackend = Literal["ragged", "masked", "stacked", "flex"]
Backend = Literal["plain", "packed", "compiled"]
LongPrompts = Literal["truncate", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Limits of the sampling engine, and how it computes. A request beyond a limit is rejected before any work."""

    max_requests: int = 64
    """Requests that run at the same time; further ones wait."""
    max_waiting: int = 256
    """Requests that may wait."""
    max_frames: int = 4096
    """Frames of a request, summed over its videos."""
    max_cache_bytes: int = 8 * 2**30
    """Memory for the keys and values of all running requests and their prompts, and for the modulations of their
    timesteps."""
    attention_backend: Literal["auto", "ragged", "masked", "stacked", "flex"] = "auto"
    """``ragged``: one call per frame, without a mask; ``masked``: one call per sequence with a block-causal mask;
    ``stacked``: one call with a mask for all requests whose caches have the same capacity; ``flex``: one call of
    FlexAttention per request. ``auto`` is stacked on GPUs; on CPUs ragged if a frame has at least 16 tokens, masked
    otherwise."""
    backend: Literal["auto", "plain", "packed", "compiled"] = "auto"
    """``packed``: a second copy of the weights in the layout that a CPU multiplies fastest; ``compiled``: torch.compile
    for the blocks; ``plain``: neither. ``auto`` is packed on CPUs and plain elsewhere."""

    long_prompts: LongPrompts = "truncate"
    """Prompts with more tokens than the text encoder takes. ``truncate``: the rest has no effect, and a warning says
    so. ``error``: they are rejected."""

    def __post_init__(self) -> None:
        if min(self.max_requests, self.max_frames, self.max_cache_bytes) < 1 or self.max_waiting < 0:
            raise ValueError("max_requests, max_frames and max_cache_bytes must be at least 1, max_waiting at least 0")
