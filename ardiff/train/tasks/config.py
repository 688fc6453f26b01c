"""Settings of the training tasks."""

from dataclasses import dataclass, field
from typing import Literal

from ardiff.diffusion.solver_names import TimestepSpacing
from ardiff.vae.config import DiscriminatorConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderTaskConfig:
    """Losses and stages of the AR-VAE (Sec. 4.1)."""

    reconstruction: Literal["mse", "l1"] = "mse"
    """Distance between pixels in [-1, 1]."""
    kl_weight: float = 1e-3
    """Weight of the Kullback-Leibler term. A higher weight makes latents smoother and easier for the DiT to learn."""
    straightness_weight: float = 0.0
    """Weight of the mean squared second difference of the latent means along time; 0 leaves it out. Latents that move
    straight while an object moves evenly let the DiT predict the next frame from the frames before it. Not in the
    paper. Clips of fewer than three frames have no such term."""
    kl_warmup_steps: int = 0
    """Steps over which ``kl_weight`` and ``straightness_weight`` rise from zero. If they are high too early, a small
    model may end up with latents that carry little content (posterior collapse)."""
    kl_warmup_power: float = 2.0
    """The weights rise with this power of the step. A higher power allows higher weights."""
    temporal_from_step: int = 0
    """First step at which the decoder attends to earlier frames; before it, frames are decoded alone (stages 1 and 2 of
    Sec. 4.1)."""
    perceptual_weight: float = 0.0
    """Weight of the perceptual distance (LPIPS) between frames and their reconstructions; 0 leaves it out."""
    perceptual_weights: str = ""
    """Safetensors file with the weights of LPIPS, local or ``s3://``. Required by the perceptual loss."""
    adversarial_weight: float = 0.0
    """Weight of the adversarial loss, multiplied by the adaptive weight; 0 trains without a discriminator."""
    adversarial_from_step: int = 0
    """First step that uses the adversarial loss and trains the discriminator (stage 2 of Sec. 4.1)."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """Sizes of the discriminator."""

    def __post_init__(self) -> None:
        if min(self.kl_weight, self.straightness_weight, self.perceptual_weight, self.adversarial_weight) < 0:
            raise ValueError(
                "kl_weight, straightness_weight, perceptual_weight and adversarial_weight must not be negative"
            )
        if self.perceptual_weight and not self.perceptual_weights:
            raise ValueError("perceptual_weight needs perceptual_weights, the file with the weights of LPIPS")
        if not 0 < self.kl_warmup_power < float("inf"):
            raise ValueError(f"kl_warmup_power must be a finite number above 0, got {self.kl_warmup_power}")
        if min(self.kl_warmup_steps, self.temporal_from_step, self.adversarial_from_step) < 0:
            raise ValueError("kl_warmup_steps, temporal_from_step and adversarial_from_step must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTTaskConfig:
    """Loss settings of the AR-DiT."""

    class_dropout: float = 0.1
    """Probability of replacing a clip's class by the null class, which classifier-free guidance needs."""
    text_dropout: float = 0.1
    """Probability of replacing a clip's text by no text, which guidance of a model with text needs. Independent of
    ``class_dropout``."""
    noise_clip: float = 0.0
    """Noise is clamped to this many standard deviations (noise clipping of Sec. 4.1); 0 does not clamp it."""
    teacher_forcing: float = 0.0
    """Share of the clips of a batch that train under teacher forcing: every frame has a uniform timestep of its own and
    sees the clean frames before it, as frames do in sampling with a large ``ar_step``. Such a clip costs twice. Not in
    the paper. 0 trains with ``diffusion.timestep_sampling`` only."""
    openings: int = 0
    """Further noisy versions of each clip's opening, as clips of ``opening_frames`` frames. A sampled video follows its
    first frames, so what the condition asks for must be right there. Their error counts as much as that of the clips.
    Not in the paper."""
    opening_frames: int = 1
    """Frames of an opening. In one frame the model learns what is there, in two or three also where it goes."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.teacher_forcing <= 1.0:
            raise ValueError(f"teacher_forcing must be in [0, 1], got {self.teacher_forcing}")
        if self.openings < 0 or self.opening_frames < 1:
            raise ValueError(
                f"openings must be 0 or more, opening_frames 1 or more, got {self.openings} and {self.opening_frames}"
            )
        if self.noise_clip < 0:
            raise ValueError(f"noise_clip must not be negative, got {self.noise_clip}")
        if not 0.0 <= self.class_dropout <= 1.0:
            raise ValueError(f"class_dropout must be in [0, 1], got {self.class_dropout}")
        if not 0.0 <= self.text_dropout <= 1.0:
            raise ValueError(f"text_dropout must be in [0, 1], got {self.text_dropout}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillTaskConfig(DiTTaskConfig):
    """How a student learns from its teacher: it predicts where the teacher's sampling trajectories end."""

    student_steps: int = 1
    """Sampling steps per frame of the student, unless a request has others."""
    teacher_solver: Literal["ddim", "dpmpp_2m"] = "dpmpp_2m"
    """Solver of the teacher's trajectories."""
    teacher_steps: int = 6
    """Sampling steps of a whole trajectory."""
    teacher_spacing: TimestepSpacing = "log_snr"
    """Timesteps of these steps."""
    guidance: float = 1.5
    """Strength of the teacher's classifier-free guidance, which the student learns. 1 turns it off."""
    start_probabilities: tuple[float, ...] = (0.7, 0.1, 0.1, 0.1)
    """Probability that a clip's trajectory begins at the first, second, ... of the teacher's timesteps. The student can
    be sampled from those with a probability above 0, with as many steps at most."""
    first_frames: int = 6
    """Further first frames per clip, each with noise of its own. They see no frame before them, so most of what a
    student must learn is in them. Their error counts as much as that of the clips."""
    trajectory_uses: int = 4
    """Updates that use the same trajectories. The batches of the others are skipped. Checkpoints are stored between
    trajectories only, so ``train.checkpoint_every`` and ``train.num_steps`` must be multiples of it."""

    def __post_init__(self) -> None:
        DiTTaskConfig.__post_init__(self)
        if self.teacher_forcing or self.openings:
            raise ValueError(
                "teacher_forcing and openings are for train-dit: a student always learns beside clean frames, and has "
                "first_frames"
            )
        if self.first_frames < 0:
            raise ValueError(f"first_frames must be 0 or more, got {self.first_frames}")
        if min(self.student_steps, self.teacher_steps, self.trajectory_uses) < 1:
            raise ValueError("student_steps, teacher_steps and trajectory_uses must be at least 1")
        if not 0 <= self.guidance < float("inf"):
            raise ValueError(f"guidance must be a finite number of at least 0, got {self.guidance}")
        if self.teacher_spacing == "distilled":
            raise ValueError("teacher_spacing=distilled is for students: a teacher has leading, trailing or log_snr")
        count, total = len(self.start_probabilities), sum(self.start_probabilities)
        if not 1 <= count <= self.teacher_steps or min(self.start_probabilities) < 0 or abs(total - 1) > 1e-6:
            raise ValueError(
                f"start_probabilities must be 1 to {self.teacher_steps} numbers (teacher_steps) of at least 0 with sum "
                f"1, got {list(self.start_probabilities)}"
            )
        if self.start_probabilities[0] == 0:
            raise ValueError("start_probabilities must begin with a number above 0: sampling begins with pure noise")
        if (most := sum(p > 0 for p in self.start_probabilities)) < self.student_steps:
            raise ValueError(
                f"student_steps is {self.student_steps}, but trajectories begin at {most} timesteps only: give "
                "start_probabilities more numbers above 0"
            )
