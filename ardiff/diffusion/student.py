"""What a student was distilled for. Does not import torch."""

import itertools
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Student:
    """A model that predicts the end of its teacher's sampling trajectory in one evaluation, made by `ardiff distill`.

    It is sampled with the solver ``lcm``, frame after frame: it has only seen frames whose earlier frames are clean.
    """

    timesteps: tuple[int, ...]
    """Timesteps from which it predicts clean latents, strictly descending. Their number is the most sampling steps."""
    num_steps: int = 1
    """Sampling steps per frame, unless a request has others."""
    guidance: float = 1.0
    """Strength of the teacher's classifier-free guidance, which the student has learnt."""

    def __post_init__(self) -> None:
        if not self.timesteps or any(a <= b for a, b in itertools.pairwise(self.timesteps)):
            raise ValueError(f"the timesteps of a student must descend, got {list(self.timesteps)}")
        if not 1 <= self.num_steps <= len(self.timesteps):
            raise ValueError(f"num_steps must be between 1 and {len(self.timesteps)}, got {self.num_steps}")

    def timesteps_of(self, num_steps: int) -> tuple[int, ...]:
        """The timesteps of ``num_steps`` sampling steps, spread evenly over :attr:`timesteps` from the first one on.

        Raises:
            ValueError: There are fewer timesteps than steps.
        """
        count = len(self.timesteps)
        if not 1 <= num_steps <= count:
            raise ValueError(f"the student takes 1 to {count} steps, got {num_steps}")
        return tuple(self.timesteps[i * count // num_steps] for i in range(num_steps))
