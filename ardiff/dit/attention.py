"""Which token may see which: masks over frames, and attention under them.

Shapes: B batch, F frames, N = B F packed frames, H heads, L tokens a frame, K head width.
"""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ardiff.layers import Attend


def block_causal_mask(num_frames: int, num_tokens: int, window: int | None = None) -> Tensor:
    """True where a token may look: at all tokens of its own frame and of earlier frames, never of later ones.

    Args:
        num_frames: F. num_tokens: L.
        window: If given, only the last ``window`` frames, the token's own included (a band).

    Returns:
        bool ``(F L, F L)``, query by key.
    """
    frame = torch.arange(num_frames)
    mask = seen(frame[:, None] - frame[None, :], window)
    return mask.repeat_interleave(num_tokens, 0).repeat_interleave(num_tokens, 1)


def seen(lag: Tensor, window: int | None) -> Tensor:
    """Whether a frame sees the one that is ``lag`` frames before it: never a later one, of a band only the last."""
    return (lag >= 0) if window is None else (lag >= 0) & (lag < window)


def after_condition(mask: Tensor, num_condition: int, condition_attention: Literal["self", "all"]) -> Tensor:
    """A mask for N condition tokens followed by the tokens of ``mask (Q, Q)``, which all see the condition tokens.

    Args:
        num_condition: N.
        condition_attention: What condition tokens see: ``self``: each other; ``all``: everything.

    Returns:
        bool ``(N + Q, N + Q)``, query by key.
    """
    mask = nn.functional.pad(mask, (num_condition, 0, num_condition, 0), value=True)
    if condition_attention == "self":
        mask[:num_condition, num_condition:] = False
    return mask


def masked_attention(mask: Tensor | None, num_frames: int) -> Attend:
    """Attention over all frames of each clip under ``mask (F L, F L)``, if any; frames come packed as N = B F."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (rearrange(t, "(b f) h l k -> b h (f l) k", f=num_frames) for t in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, F L, K)
        return rearrange(mixed, "b h (f l) k -> (b f) h l k", f=num_frames)

    return attend
