"""Settings of the training jobs."""

from dataclasses import dataclass, field
from typing import Literal

from ardiff.data import storage
from ardiff.data.config import ClipConfig
from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit.config import DiTConfig, LoRAConfig
from ardiff.models import AnyAutoencoderConfig, AnyDiTConfig
from ardiff.train.config import TrainConfig
from ardiff.train.tasks.config import AutoencoderTaskConfig, DistillTaskConfig, DiTTaskConfig
from ardiff.vae.config import AutoencoderConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainVAEConfig:
    """One run of AR-VAE training."""

    output: str = "runs/vae"
    """Folder of the run. The trained model is written to its subfolder ``model``."""
    clips: ClipConfig = field(default_factory=ClipConfig)
    """Training clips."""
    init_from: str = ""
    """Initial weights: an AR-VAE folder, a pipeline folder or a training checkpoint (which also has the discriminator),
    local or ``s3://``. Wider latents are pruned to ``vae.token_dim``, positions of frames of another shape are
    interpolated. Empty starts from random weights."""
    vae: AnyAutoencoderConfig = field(default_factory=AutoencoderConfig)
    """The model."""
    task: AutoencoderTaskConfig = field(default_factory=AutoencoderTaskConfig)
    """The losses."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The optimisation."""
    resume: str = "auto"
    """Where to start. ``auto``: from the last checkpoint in the output folder, if there is one. ``latest``: the same,
    but an error if there is none. ``none``: start again and delete the checkpoints in the output folder. Otherwise the
    folder of a checkpoint of another run, used while the output folder has none of its own. Learning rates, schedule
    and other hyperparameters may differ from that run; everything else must be equal."""

    @property
    def model(self) -> str:
        """Folder of the trained AR-VAE."""
        return storage.join(self.output, "model")


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTDataConfig:
    """Training data of the AR-DiT."""

    source: Literal["latents", "clips"] = "latents"
    """``latents``: stored latents from ``ardiff encode``. ``clips``: videos that the AR-VAE encodes in every step;
    nothing is stored, and every epoch has different clips."""
    vae: str = ""
    """Folder of the AR-VAE that encodes the clips. With stored latents it must be the one that encoded them; empty uses
    that one."""
    clips: ClipConfig = field(default_factory=ClipConfig)
    """Clips of the source ``clips``."""
    statistics_clips: int = 512
    """Number of clips, the first in training order, whose latents determine the normalisation. For the source
    ``clips``."""
    text_encoder: str = ""
    """Fingerprint of the text encoder whose texts beside the stored latents are used, for
    ``dit.condition=cross_attention``. Empty: the only one."""

    def __post_init__(self) -> None:
        if self.source == "clips" and not self.vae:
            raise ValueError("source=clips needs vae, the folder of the AR-VAE that encodes them")
        if self.statistics_clips < 1:
            raise ValueError("statistics_clips must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainDiTConfig:
    """One run of AR-DiT training."""

    output: str = "runs/dit"
    """Folder of the run. The trained pipeline is written to its subfolder ``pipeline``."""
    latents: str = "runs/latents"
    """Folder of stored latents with ``latents.json``, as printed by ``ardiff encode``."""
    files_per_chunk: int = 16
    """Parquet files that are loaded and shuffled together."""
    init_from: str = ""
    """Initial weights: a pipeline folder, local or ``s3://``, also of other shapes of frames. Empty starts from random
    weights."""
    data: DiTDataConfig = field(default_factory=DiTDataConfig)
    """Stored latents or videos."""
    dit: AnyDiTConfig = field(default_factory=DiTConfig)
    """The model."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """A low-rank adapter to train instead of the whole model."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """The diffusion process."""
    task: DiTTaskConfig = field(default_factory=DiTTaskConfig)
    """The loss."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The optimisation."""
    resume: str = "auto"
    """Where to start. ``auto``: from the last checkpoint in the output folder, if there is one. ``latest``: the same,
    but an error if there is none. ``none``: start again and delete the checkpoints in the output folder. Otherwise the
    folder of a checkpoint of another run, used while the output folder has none of its own. Learning rates, schedule
    and other hyperparameters may differ from that run; everything else must be equal."""

    def __post_init__(self) -> None:
        if self.files_per_chunk < 1:
            raise ValueError("files_per_chunk must be at least 1")
        if self.dit.text and self.data.source == "clips":
            raise ValueError(
                "data.source=clips has no texts, because only `ardiff encode` stores token states of captions: a model "
                "with dit.condition=cross_attention trains on data.source=latents"
            )
        if self.diffusion.student is not None:
            raise ValueError("diffusion.student is written by `ardiff distill`: train-dit trains no student")
        if self.task.teacher_forcing and not self.dit.causal:
            raise ValueError("task.teacher_forcing shows frames the ones before them: set dit.attention=causal")
        if self.lora.rank and not self.init_from:
            raise ValueError("lora.rank needs init_from, the folder of the pipeline that the adapter changes")
        if self.data.text_encoder and not self.dit.text:
            raise ValueError("data.text_encoder is for a model with text: set dit.condition=cross_attention")

    @property
    def pipeline(self) -> str:
        """Folder of the trained pipeline."""
        return storage.join(self.output, "pipeline")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """One run of distillation."""

    output: str = "runs/student"
    """Folder of the run. The student, a pipeline, is written to its subfolder ``pipeline``."""
    teacher: str = "runs/dit/pipeline"
    """Folder of the teacher, a pipeline whose frames never see later ones, local or ``s3://``. The student has its
    sizes and starts from its weights."""
    latents: str = "runs/latents"
    """Folder of stored latents with ``latents.json``, made by the teacher's AR-VAE."""
    files_per_chunk: int = 16
    """Parquet files that are loaded and shuffled together."""
    text_encoder: str = ""
    """Fingerprint of the text encoder whose texts beside the latents are used, for a teacher with text. Empty: the only
    one."""
    task: DistillTaskConfig = field(default_factory=DistillTaskConfig)
    """What the student learns."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The optimisation."""
    resume: str = "auto"
    """Where to start, as in `ardiff train-dit`."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "checkpoint_every"):
            if (value := getattr(self.train, name)) % self.task.trajectory_uses:
                raise ValueError(
                    f"train.{name} must be a multiple of task.trajectory_uses ({self.task.trajectory_uses}), because "
                    f"checkpoints are stored between trajectories only; got {value}"
                )

    @property
    def pipeline(self) -> str:
        """Folder of the student."""
        return storage.join(self.output, "pipeline")
