"""Configuration of the diffusion process."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ardiff.diffusion import noise
from ardiff.diffusion.sampling_defaults import SamplingDefaults
from ardiff.diffusion.student import Student
from ardiff.diffusion.timestep_sampling import TimestepSampling

Prediction = Literal["x0", "eps", "v"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionConfig:
    """The noise schedule, what the model predicts, and how training samples timesteps (Sec. 3.2, Table 6)."""

    num_timesteps: int = 1000
    """T."""
    beta_start: float = 1e-4
    """First variance of the schedule."""
    beta_end: float = 0.02
    """Last variance. Table 6 prints 0.002, see :func:`ardiff.diffusion.noise.betas`."""
    prediction: Prediction = "x0"
    """What the model predicts: clean latents, noise, or velocity."""
    timestep_sampling: TimestepSampling = "fopp"
    """How training samples the timesteps of a clip's frames. ``fopp``: non-decreasing along frames (Alg. 1).
    ``synchronous``: one for the whole clip. ``independent``: one per frame. ``uniform_from_first``: each frame is
    uniform between the previous frame's timestep and T - 1."""
    student: Student | None = None
    """What the model was distilled for, written by `ardiff distill`. None: it is no student."""
    sampling_defaults: SamplingDefaults | None = field(default=None, metadata={"omit_default": True})
    """Sampling steps and ``ar_step`` of the model's videos, unless a request has others. None: the usual ones, 50 and
    5. A student has its own, in ``student``."""

    def __post_init__(self) -> None:
        noise.betas(self.num_timesteps, self.beta_start, self.beta_end)
        if self.sampling_defaults is None:
            return
        if self.student is not None:
            raise ValueError("diffusion.sampling_defaults is not for students: diffusion.student holds theirs")
        if self.sampling_defaults.num_inference_steps > self.num_timesteps:
            raise ValueError(
                f"sampling_defaults.num_inference_steps {self.sampling_defaults.num_inference_steps} must be at most "
                f"num_timesteps, {self.num_timesteps}"
            )

    def alphas_cumprod(self) -> Tensor:
        """Cumulative products of ``1 - betas``, float64 ``(T,)``."""
        return noise.alphas_cumprod(noise.betas(self.num_timesteps, self.beta_start, self.beta_end))
