"""Configuration of the diffusion process."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ardiff.diffusion import noise
from ardiff.diffusion.timestep_sampling import TimestepSampling

Prediction = Literal["x0", "eps", "v"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionConfig:
    """The noise schedule and what the model is trained to predict (Sec. 3.2, Table 6)."""

    num_timesteps: int = 1000
    """T."""
    beta_start: float = 1e-4
    """First variance of the schedule."""
    beta_end: float = 0.02
    """Last variance; see :func:`ardiff.diffusion.noise.betas` for the misprint in Table 6."""
    prediction: Prediction = "x0"
    """Target of the model: clean latents, noise, or velocity."""
    timestep_sampling: TimestepSampling = "fopp"
    """How training draws the timesteps of a clip's frames."""

    def __post_init__(self) -> None:
        noise.betas(self.num_timesteps, self.beta_start, self.beta_end)

    def alphas_cumprod(self) -> Tensor:
        """float64 ``(T,)``."""
        return noise.alphas_cumprod(noise.betas(self.num_timesteps, self.beta_start, self.beta_end))
