"""The Muon optimizer, fast for small matrices and equally fast on processors without bfloat16."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al., 2024: https://kellerjordan.github.io/posts/muon/) with another inner loop.

    torch orthogonalises one matrix after another, always in bfloat16. That takes more than half of a step of a small
    model on a processor that has no bfloat16 instructions. Here all matrices of a shape are one batch, in float32
    except on CUDA devices.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.0, momentum: float = 0.95) -> None:
        """Of torch's other options, only the defaults are implemented: Nesterov's momentum, the original rates."""
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                momenta = self._stacked([self._momentum(parameter, group) for parameter in parameters])  # (n, A, B)
                updates = orthogonalise(momenta, group["ns_coefficients"], group["ns_steps"], group["eps"])
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                self._subtract(parameters, updates.to(parameters[0].dtype), rate)
        return loss

    def _stacked(self, matrices: list[Tensor]) -> Tensor:
        """Matrices of one shape as ``(n, A, B)``."""
        return torch.stack(matrices)

    def _subtract(self, parameters: list[Tensor], updates: Tensor, rate: float) -> None:
        """Subtracts ``rate`` times ``updates (n, A, B)`` from the parameters."""
        torch._foreach_add_(parameters, list(updates), alpha=-rate)

    def _momentum(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Advances the momentum of ``parameter`` by its gradient and returns Nesterov's update before projection."""
        gradient, momentum = parameter.grad, group["momentum"]
        assert gradient is not None
        state = self.state[parameter]
        buffer: Tensor = state.setdefault("momentum_buffer", torch.zeros_like(gradient))
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)


def orthogonalise(matrices: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """The nearly orthogonal matrices nearest to ``matrices`` ``(n, A, B)``, by a quintic Newton-Schulz iteration.

    Singular values end between about 0.5 and 1.5, which is all that Muon needs.
    """
    a, b, c = coefficients
    x = matrices.to(torch.bfloat16 if matrices.device.type == "cuda" else torch.float32)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
