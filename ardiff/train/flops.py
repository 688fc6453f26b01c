"""Counts model FLOPs: the operations of forward and backward passes, with a multiplication and an addition as two.

Only matrix products and convolutions count. Recomputed activations do not count (Chowdhery et al., 2022, App. B), also
those of attention, and neither does the optimizer. Masked attention counts as if there were no mask. A frozen network,
such as an encoder of clips, counts with its forward pass.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper

from ardiff import onednn

aten = torch.ops.aten


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *others: Any, **options: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: torch.Size, *inputs: Any, **options: Any) -> int:
    return 2 * _attention(*inputs)


def _linear(x: torch.Size, weight: torch.Size, *others: Any, **options: Any) -> int:
    return 2 * x.numel() * weight[0]


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention),
    **{
        kernel: shape_wrapper(_attention_backward)
        for kernel in (
            aten._scaled_dot_product_flash_attention_for_cpu_backward,
            aten._scaled_dot_product_flash_attention_backward,
            aten._scaled_dot_product_efficient_attention_backward,
            aten._scaled_dot_product_cudnn_attention_backward,
        )
    },
    **({torch.ops.mkldnn._linear_pointwise: shape_wrapper(_linear)} if onednn.available() else {}),
}
"""By operator, a function that gives the operations of a call."""


class FlopCounter(TorchDispatchMode):
    """Counts the operations in its context. The backward pass counts only if it runs in the context as well."""

    recomputing = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None and not FlopCounter.recomputing:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


@contextlib.contextmanager
def recomputation() -> Iterator[None]:
    """Marks a block as recomputation of activations, which does not count."""
    FlopCounter.recomputing = True
    try:
        yield
    finally:
        FlopCounter.recomputing = False
