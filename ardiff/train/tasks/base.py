"""The interface of a training task."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ardiff.randomness import BatchGenerator

Batch = dict[str, Tensor]


class Task(ABC):
    """A model and its loss. In adversarial training also a discriminator, which learns against the model."""

    model: nn.Module
    discriminator: nn.Module | None = None
    """Trained by an engine of its own; None without adversarial training."""
    discriminator_from_step: int = 0
    """First step (0-based) that trains the discriminator."""
    stage_starts: tuple[int, ...] = ()
    """Steps (0-based) from which the loss uses other operations than before."""

    checkpoint_interval: int = 1
    """Training can resume exactly after a multiple of this many steps."""

    lengths: tuple[int, ...] = ()
    """Numbers of frames of the clips, if there are several: the part of each is logged."""

    def length_shares(self, clips: Tensor) -> dict[str, Tensor]:
        """Values to log for a micro-batch of ``clips (B, F, ...)``: 1 for its length, and 0 for the others."""
        return {f"share_{frames}_frames": clips.new_tensor(float(clips.shape[1] == frames)) for frames in self.lengths}

    def kind_of(self, step: int) -> int:
        """Tells steps apart whose loss costs different operations."""
        return sum(step >= start for start in self.stage_starts)

    @abstractmethod
    def loss(self, batch: Batch, step: int, draws: BatchGenerator) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss of a micro-batch on the model's device, and values to log.

        A value is either a scalar, which is averaged over micro-batches and ranks, or a sum and a count ``(2,)``, which
        are added up. ``draws`` is the only source of randomness.
        """

    def discriminator_loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's scalar loss on input and output of the last call of :meth:`loss`, and values to log.

        Its gradients reach only the discriminator, and those of :meth:`loss` only the model.
        """
        raise NotImplementedError("this task has no discriminator")

    def samples(self, model: nn.Module) -> Tensor | None:
        """Videos that show what ``model`` can do, uint8 ``(B, F, H, W, 3)``, the same ones every time; None without."""
        return None
