"""What all checks share: the device, the models, clocks and rows of results."""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiT, DiTConfig
from ardiff.errors import ArdiffError
from ardiff.gpu_check.config import GpuCheckConfig
from ardiff.models import make_autoencoder, make_dit
from ardiff.resolution import Resolution
from ardiff.tensors import ModuleT
from ardiff.vae import ARAutoencoder, AutoencoderConfig

PAPER_DIT = DiTConfig(num_classes=101)
PAPER_VAE = AutoencoderConfig()
TINY_DIT = DiTConfig(num_frames=8, num_tokens=4, token_dim=4, width=32, depth=2, num_heads=2, num_classes=3)
TINY_VAE = AutoencoderConfig(
    resolution=Resolution.square(16),
    patch_size=8,
    num_tokens=4,
    token_dim=4,
    width=32,
    depth=1,
    num_heads=2,
    temporal_window=4,
)


@dataclass(frozen=True, slots=True)
class Row:
    """One measured value."""

    check: str
    """The check that measured it."""
    name: str
    value: float
    unit: str
    limit: float | None = None
    """The largest value that is right; None if the value is only reported."""

    @property
    def ok(self) -> bool:
        """Whether the value is right. NaN is not."""
        return self.limit is None or self.value <= self.limit


@dataclass(frozen=True)
class Setup:
    """The device and the models to check."""

    device: torch.device
    tiny: bool
    compile: bool
    peak_tflops: float

    @classmethod
    def of(cls, config: GpuCheckConfig) -> "Setup":
        """The setup of a configuration on this machine."""
        has_gpu = torch.cuda.is_available()
        if config.device == "cuda" and not has_gpu:
            raise ArdiffError("device=cuda, but PyTorch sees no GPU on this machine: use device=cpu or auto.")
        device = torch.device("cuda" if config.device == "auto" and has_gpu else config.device.replace("auto", "cpu"))
        tiny = config.size == "tiny" or (config.size == "auto" and device.type == "cpu")
        return cls(device, tiny, config.compile, config.peak_tflops)

    @property
    def dit_config(self) -> DiTConfig:
        """Sizes of the AR-DiT."""
        return TINY_DIT if self.tiny else PAPER_DIT

    @property
    def vae_config(self) -> AutoencoderConfig:
        """Sizes of the AR-VAE."""
        return TINY_VAE if self.tiny else PAPER_VAE

    @functools.cached_property
    def diffusion(self) -> DiffusionConfig:
        """The diffusion process."""
        return DiffusionConfig()

    def dit(self, depth: int | None = None) -> DiT:
        """An AR-DiT with random weights on the CPU, none of them zero."""
        config = self.dit_config
        if depth is not None:
            config = replace(config, depth=min(depth, config.depth))
        return randomised(functools.partial(make_dit, config))

    def vae(self) -> ARAutoencoder:
        """An AR-VAE with random weights on the CPU, none of them zero."""
        return randomised(functools.partial(make_autoencoder, self.vae_config))

    def synchronise(self) -> None:
        """Waits until the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """The rate of a large matrix product, in 10^12 operations per second."""
        side = 256 if self.tiny else 8192
        factor = torch.randn(side, side, device=self.device).to(dtype)
        return 2 * side**3 / self.seconds(lambda: factor @ factor) / 1e12

    def seconds(self, call: Callable[[], object], repeats: int = 5) -> float:
        """Seconds of a call, the median of some after a first one that is not counted."""
        times = []
        for _ in range(repeats + 1):
            self.synchronise()
            start = time.perf_counter()
            call()
            self.synchronise()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def peak_memory(self, call: Callable[[], object]) -> float | None:
        """GiB that the device holds at most during a call; None on a CPU, which does not count them."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronise()
        return torch.cuda.max_memory_allocated(self.device) / 2**30


def randomised(make: Callable[[], ModuleT]) -> ModuleT:
    """A model with weights that depend on its sizes only. Those that start at zero are small, so that every layer has
    an effect. In evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def rms(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, over that of ``expected``."""
    difference = result.detach().double().cpu() - expected.double().cpu()
    return float(difference.square().mean().sqrt() / expected.double().cpu().square().mean().sqrt())
