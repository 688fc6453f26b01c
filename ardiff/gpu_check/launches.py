"""Counts the kernels that a piece of code launches on a device, and how often the host waits for it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

NO_KERNEL = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view}
"""Operators that change no data, beside views."""
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal}
"""Operators whose result the host waits for, beside copies to it."""


class LaunchCounter(TorchDispatchMode):
    """Counts kernels and waits of one device in its context. A backward pass counts if it runs there, too."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.kernels = 0
        """Operators that launch kernels, most of them one, or a copy to or from the device."""
        self.syncs = 0
        """Times that the host waits until the device has computed something."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._can_decompose():  # into the operators that run; inference mode leaves that to us
            with self:
                return func.decompose(*args, **kwargs)
        read = self._is_read(func.overloadpacket, args, kwargs)
        result = self.call(func, args, kwargs, read)
        launches = not (func.is_view or func.namespace == "prim" or func.overloadpacket in NO_KERNEL)
        self.kernels += read or (launches and any(map(self._here, tree_leaves((args, kwargs, result)))))
        self.syncs += read
        return result

    def call(self, func: Any, args: Any, kwargs: Any, read: bool) -> Any:
        """The result of an operator. ``read``: the host waits for it."""
        return func(*args, **kwargs)

    def _is_read(self, operator: Any, args: Any, kwargs: Any) -> bool:
        if operator is aten.copy_:
            return self._here(args[1]) and not self._here(args[0])
        to_host = operator is aten._to_copy and not kwargs.get("non_blocking")
        to_host = to_host and kwargs.get("device", self.device).type != self.device.type
        return (operator in READS or to_host) and self._here(args[0])

    def _here(self, leaf: object) -> bool:
        return isinstance(leaf, Tensor) and leaf.device.type == self.device.type
