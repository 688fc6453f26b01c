"""The names of solvers and timestep spacings, see :mod:`ardiff.diffusion.solvers`. Does not import torch."""

from typing import Literal

Solver = Literal["ddim", "dpmpp_2m", "unipc", "lcm"]
TimestepSpacing = Literal["leading", "trailing", "log_snr", "distilled"]
