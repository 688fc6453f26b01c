"""Feature networks by OpenVINO, which computes convolutions on CPUs faster than torch does. An optional backend."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ardiff.errors import ConfigError

Backend = Literal["torch", "openvino"]


class OpenVINO(nn.Module):
    """A network of one tensor to one tensor, compiled for the shape of its first input. It computes in float32.

    Args:
        model: The network, in evaluation mode.
        threads: Threads of a forward pass.

    Raises:
        ConfigError: The package openvino is not installed.
    """

    def __init__(self, model: nn.Module, threads: int = 1) -> None:
        super().__init__()
        self.model, self.threads = model, threads
        self.compiled: dict[torch.Size, Any] = {}
        _package()

    def forward(self, x: Tensor) -> Tensor:
        """The same as ``model(x)`` up to rounding."""
        if x.shape not in self.compiled:
            self.compiled[x.shape] = self._compile(x)
        return torch.from_numpy(self.compiled[x.shape](x.contiguous().numpy())[0])

    def _compile(self, x: Tensor) -> Any:
        openvino = _package()
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        frontend = FrontEndManager().load_by_framework("pytorch")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's, about checks of the shape, which is fixed
            decoder = TorchScriptPythonDecoder(self.model, example_input=x)  # must outlive the conversion
            graph = frontend.convert(frontend.load(decoder))
        graph.reshape({0: list(x.shape)})
        settings = {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",  # by default bfloat16 on processors that have it
        }
        return openvino.Core().compile_model(graph, "CPU", settings)


def _package() -> Any:
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"backend=openvino needs the package {error.name}, which is not installed: pip install 'ardiff[openvino]'."
        ) from error
    return openvino
