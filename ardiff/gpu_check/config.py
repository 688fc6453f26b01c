"""Settings of ``ardiff gpu-check``."""

from dataclasses import dataclass
from typing import Literal, get_args

CheckName = Literal["ceilings", "exactness", "sampling", "training", "checkpoints", "autoencoder", "features"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuCheckConfig:
    """Checks of one device: its ceilings, exactness against a CPU in float64, speed and memory."""

    output: str = "runs/gpu-check"
    """Folder of the results, ``gpu-check.json`` and ``gpu-check.md``. Each check adds its rows as soon as it ends."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes the first GPU, or the CPU if there is none."""
    size: Literal["auto", "paper", "tiny"] = "auto"
    """Size of the models: the paper's, or tiny ones to test the command. ``auto`` is the paper's on a GPU."""
    checks: tuple[CheckName, ...] = get_args(CheckName)
    """What to check, in this order."""
    compile: bool = True
    """Also check ``torch.compile``, which takes a C compiler and some minutes."""
    seconds: float = 480.0
    """No check begins later than this after the start."""
    peak_tflops: float = 0.0
    """Peak of the device in bf16, in 10^12 operations per second, for the utilisation of training; 0 takes the rate of
    the large matrix product."""

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.peak_tflops < 0:
            raise ValueError("seconds must be above 0, peak_tflops not negative")
        if not self.checks:
            raise ValueError("checks must name at least one check")
