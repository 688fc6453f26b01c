"""Adversarial losses of the AR-VAE (Sec. 4.1, second stage), as in taming transformers (Esser et al., 2021).

Shapes: N packed frames, P patches per frame, I and O input and output channels of the decoder's last layer.
"""

import contextlib
from collections.abc import Iterator

import torch
from einops import einsum
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ardiff import distributed


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge loss (Lim and Ye, 2017): zero if real scores exceed 1 and fake ones are below -1.

    ``real`` and ``fake`` are scores of any shape; returns a scalar.
    """
    return 0.5 * (nn.functional.relu(1.0 - real).mean() + nn.functional.relu(1.0 + fake).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """The autoencoder's adversarial loss: the negative mean score of decoded frames. Returns a scalar."""
    return -fake.mean()


class LayerRecord:
    """Input and output of a layer's last call, still in the graph.

    Those of a linear layer are ``(N, P, I)`` and ``(N, P, O)``, of a convolution ``(N, I, H, W)`` and ``(N, O, H, W)``.
    """

    input: Tensor
    output: Tensor
    kernel: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def weight_gradient(self, output_gradient: Tensor) -> Tensor:
        """The gradient of a loss with respect to the layer's weight, from that with respect to its output."""
        inputs, output_gradient = self.input.detach().float(), output_gradient.float()
        if inputs.ndim == 3:
            return einsum(output_gradient, inputs, "n p o, n p i -> o i")
        shape = (output_gradient.shape[1], inputs.shape[1], *self.kernel)
        return conv2d_weight(inputs, shape, output_gradient, padding=self.padding)


@contextlib.contextmanager
def recorded(layer: nn.Module) -> Iterator[LayerRecord]:
    """Records the last call of ``layer``, linear or convolutional, within the context."""
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
    """The factor that gives both losses gradients of equal norm at the decoder's last layer.

    Esser et al. (2021), Eq. 7: the norm of the reconstruction loss's gradient with respect to the layer's weight over
    that of the adversarial loss. Both are computed from the layer's input and output, so the weight itself may be
    sharded (ZeRO stage 3), and no ``.grad`` changes. Gradients are averaged over all workers, which get the same
    factor; each micro-batch (``gradient_accumulation``) has its own.

    Gradients are those of the losses before fp16's loss scale, and norms are float32 in every precision.

    Returns:
        A scalar without graph, in ``[0, limit]``.
    """
    norms = []
    with torch.autocast(last.output.device.type, enabled=False):
        for loss in (reconstruction, adversarial):
            gradient = last.weight_gradient(_output_gradient(loss, last.output))
            distributed.average_([gradient])
            norms.append(gradient.norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, limit)


def _output_gradient(loss: Tensor, output: Tensor) -> Tensor:
    """The gradient of ``loss`` with respect to ``output``, float32.

    The gradient of a mean underflows in fp16, so the loss is scaled to a sum first, or by the largest factor below
    that which does not overflow.
    """
    scale = float(output.numel()) if output.dtype == torch.float16 else 1.0
    while True:
        (gradient,) = torch.autograd.grad(loss * scale, output, retain_graph=True)
        if scale == 1.0 or gradient.isfinite().all():
            return gradient.float() / scale
        scale = max(1.0, scale / 16)
