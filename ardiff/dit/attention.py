"""Attention masks over frames, attention under them, and attention to text.

Shapes: B videos, F frames, N = B F packed frames, H heads, L tokens per frame, K head width, M condition or text
tokens, P prompts.
Masks are bool, query by key; True means that the query sees the key.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ardiff.layers import Attend, AttendText


def block_causal_mask(num_frames: int, num_tokens: int, window: int | None = None) -> Tensor:
    """The mask ``(F L, F L)`` in which a token sees all tokens of its own frame and of earlier frames.

    Args:
        num_frames: F. num_tokens: L.
        window: If given, a token sees only the last ``window`` frames, its own included (a band).
    """
    frame = torch.arange(num_frames)
    mask = is_visible(frame[:, None] - frame[None, :], window)  # (F, F)
    return repeat(mask, "q k -> (q lq) (k lk)", lq=num_tokens, lk=num_tokens)


def is_visible(lag: Tensor, window: int | None) -> Tensor:
    """Whether a frame sees the frame ``lag`` frames before it: no later one and, with a window, only the last ones."""
    return (lag >= 0) if window is None else (lag >= 0) & (lag < window)


def teacher_forcing_mask(
    num_frames: int, num_tokens: int, window: int | None = None, device: torch.device | None = None
) -> Tensor:
    """The mask ``(2 F L, 2 F L)`` of F clean frames and then F noisy ones at the same positions.

    A clean frame sees as in :func:`block_causal_mask`. A noisy frame sees itself and, of the frames before it, the
    clean ones; so each is denoised as if all frames before it were finished. It is made on ``device``.
    """
    frame = torch.arange(num_frames, device=device)
    lag = frame[:, None] - frame[None, :]  # (F, F)
    visible, itself = is_visible(lag, window), lag == 0
    clean = torch.cat([visible, torch.zeros_like(visible)], dim=1)  # (F, 2 F)
    noisy = torch.cat([visible & ~itself, itself], dim=1)  # (F, 2 F)
    return repeat(torch.cat([clean, noisy]), "q k -> (q lq) (k lk)", lq=num_tokens, lk=num_tokens)


def prepend_condition(mask: Tensor, num_condition: int) -> Tensor:
    """Adds M condition tokens before a sequence: ``(Q, Q) -> (M + Q, M + Q)``.

    All tokens see the condition tokens; condition tokens see only one another.
    """
    mask = nn.functional.pad(mask, (num_condition, 0, num_condition, 0), value=True)
    mask[:num_condition, num_condition:] = False
    return mask


def masked_attention(mask: Tensor | None, num_frames: int) -> Attend:
    """Attention over all frames of each clip under ``mask (F L, F L)``; None is no mask. Frames are packed as N."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (rearrange(t, "(b f) h l k -> b h (f l) k", f=num_frames) for t in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, F L, K)
        return rearrange(mixed, "b h (f l) k -> (b f) h l k", f=num_frames)

    return attend


def text_attention(keys: Tensor, values: Tensor, mask: Tensor, index: Tensor, num_frames: int) -> AttendText:
    """Attention of packed frames to the tokens of their prompts.

    Args:
        keys, values: ``(P, H, M, K)``.
        mask: bool ``(P, M)``, True for a token.
        index: int64 ``(B,)`` or ``(B, F)``, the prompt of each video or frame.
        num_frames: F.
    """
    if index.ndim == 1:
        pattern, packed = "(b f) h l k -> b h (f l) k", "b h (f l) k -> (b f) h l k"
    else:
        pattern = packed = "n h l k -> n h l k"
    rows = index.flatten()
    keys, values, visible = keys[rows], values[rows], mask[rows][:, None, None]  # (B or N, H, M, K) each, (.., 1, 1, M)
    axes = {"f": num_frames} if index.ndim == 1 else {}

    def attend(q: Tensor) -> Tensor:
        mixed = nn.functional.scaled_dot_product_attention(rearrange(q, pattern, **axes), keys, values, visible)
        return rearrange(mixed, packed, **axes)

    return attend
