"""Adversarial losses of the AR-VAE (Sec. 4.1, second stage), as in taming transformers (Esser et al., 2021).

Shapes: N packed frames, P patches a frame, I and O input and output channels of the decoder's last layer.
"""

import contextlib
from collections.abc import Iterator

import torch
from einops import einsum
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ardiff import distributed


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises: scores of real frames should exceed 1, those of decoded ones fall below -1.

    ``real`` and ``fake`` are its scores, of any shape (Lim and Ye, 2017); returns a scalar.
    """
    return 0.5 * (nn.functional.relu(1.0 - real).mean() + nn.functional.relu(1.0 + fake).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """What the autoencoder minimises besides: decoded frames should score high. Returns a scalar."""
    return -fake.mean()


class LayerRecord:
    """Input and output of a layer's last call, still in the graph.

    Those of a linear layer are ``(N, P, I)`` and ``(N, P, O)``, of a convolution ``(N, I, H, W)`` and ``(N, O, H, W)``.
    """

    input: Tensor
    output: Tensor
    kernel: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def weight_gradient(self, slope: Tensor) -> Tensor:
        """The gradient of a loss with respect to the layer's weight, given that with respect to its output."""
        inputs, slope = self.input.detach().float(), slope.float()
        if inputs.ndim == 3:
            return einsum(slope, inputs, "n p o, n p i -> o i")
        shape = (slope.shape[1], inputs.shape[1], *self.kernel)
        return conv2d_weight(inputs, shape, slope, padding=self.padding)


@contextlib.contextmanager
def recorded(layer: nn.Module) -> Iterator[LayerRecord]:
    """Within the context, what goes through ``layer``, linear or convolutional, is kept in the record it gives."""
    record = LayerRecord()
    if isinstance(layer, nn.Conv2d):
        record.kernel = (layer.kernel_size[0], layer.kernel_size[1])
        record.padding = (int(layer.padding[0]), int(layer.padding[1]))

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        record.input, record.output = inputs[0], output

    handle = layer.register_forward_hook(keep)
    try:
        yield record
    finally:
        handle.remove()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: LayerRecord, limit: float = 1e4) -> Tensor:
    """The factor that makes the adversarial loss pull as hard on the decoder's last layer as the reconstruction does.

    Esser et al. (2021), Eq. 7: the ratio of the norms of both losses' gradients with respect to the layer's weight.
    They are computed from the gradients of its output and its input, so the weight itself may lie elsewhere in
    pieces (ZeRO stage 3), and nothing is accumulated. All workers get the same factor, that of the samples which they
    hold together; parts of a batch (``gradient_accumulation``) have one each.

    Gradients are those of the losses themselves, before fp16's loss scale, and norms are float32 in every precision.

    Returns:
        A scalar without graph, in ``[0, limit]``.
    """
    norms = []
    with torch.autocast(last.output.device.type, enabled=False):
        for loss in (reconstruction, adversarial):
            gradient = last.weight_gradient(_slope(loss, last.output))
            distributed.average_([gradient])
            norms.append(gradient.norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, limit)


def _slope(loss: Tensor, output: Tensor) -> Tensor:
    """The gradient of ``loss`` with respect to ``output``, float32.

    That of a mean is too small for fp16: it is taken of the sum, or of the largest part of it that does not overflow.
    """
    scale = float(output.numel()) if output.dtype == torch.float16 else 1.0
    while True:
        (slope,) = torch.autograd.grad(loss * scale, output, retain_graph=True)
        if scale == 1.0 or slope.isfinite().all():
            return slope.float() / scale
        scale = max(1.0, scale / 16)
