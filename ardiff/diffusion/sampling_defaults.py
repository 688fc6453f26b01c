"""The sampling parameters that suit a model, stored with it. Does not import torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingDefaults:
    """What the model's videos are sampled with where a request leaves these parameters out."""

    num_inference_steps: int = 50
    """Sampling steps per frame, S in the paper."""
    ar_step: int = 5
    """Difference of timesteps between neighbouring frames, in sampling steps. With another number of steps its share of
    them stays the same."""

    def __post_init__(self) -> None:
        if not 0 <= self.ar_step <= self.num_inference_steps or self.num_inference_steps < 1:
            raise ValueError(
                f"num_inference_steps must be at least 1 and ar_step between 0 and num_inference_steps, got "
                f"{self.num_inference_steps} and {self.ar_step}"
            )

    def ar_step_of(self, num_inference_steps: int) -> int:
        """The ``ar_step`` whose share of ``num_inference_steps`` is that of the defaults, rounded up."""
        return -(-self.ar_step * num_inference_steps // self.num_inference_steps)
