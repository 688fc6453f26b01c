"""The teacher of a student: what its pipeline folder says, and whether a student can learn from it on these latents."""

from dataclasses import dataclass, replace

from ardiff.data import storage
from ardiff.data.latents import LatentSet, LatentStatistics, read_description, vae_fingerprint
from ardiff.data.texts import TextSet, UsedEncoder
from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiTConfig
from ardiff.errors import CheckpointError, ConfigError
from ardiff.models import AnyDiTConfig
from ardiff.pretrained import CONFIG, PIPELINE, build_config, read_config
from ray_jobs.training.config import DistillConfig, DiTDataConfig, TrainDiTConfig


@dataclass(frozen=True, slots=True)
class Teacher:
    """A pipeline without its weights."""

    uri: str
    dit: DiTConfig
    diffusion: DiffusionConfig
    statistics: LatentStatistics
    class_names: list[str]
    text_encoder: UsedEncoder | None

    def training(self, config: DistillConfig) -> TrainDiTConfig:
        """The settings of a training of the same model on the student's data."""
        return TrainDiTConfig(
            output=config.output,
            latents=config.latents,
            files_per_chunk=config.files_per_chunk,
            data=DiTDataConfig(text_encoder=config.text_encoder),
            dit=self.dit,
            diffusion=self.diffusion,
            train=config.train,
            resume=config.resume,
        )


def read_teacher(uri: str) -> Teacher:
    """Reads the configuration of a pipeline that can teach.

    Raises:
        CheckpointError: There is no pipeline.
        ConfigError: No student can learn from it; says why.
    """
    if not storage.exists(storage.join(uri, CONFIG)):
        raise CheckpointError(f"There is no pipeline in {uri}: give teacher=FOLDER, which should hold {CONFIG}.")
    config = read_config(uri, PIPELINE)
    text_encoder = config.get("text_encoder")
    teacher = Teacher(
        storage.absolute(uri),
        build_config(AnyDiTConfig, config["dit"]),
        build_config(DiffusionConfig, config["diffusion"]),
        LatentStatistics(**config["latent_statistics"]),
        config["class_names"],
        None if text_encoder is None else build_config(UsedEncoder, text_encoder),
    )
    if (reason := teacher_error(teacher)) is not None:
        raise ConfigError(f"{uri} cannot be a teacher: {reason}.")
    return teacher


def teacher_error(teacher: Teacher) -> str | None:
    """Why no student can learn from the teacher; None if one can."""
    if not teacher.dit.causal:
        return (
            "its frames see later ones (dit.attention=bidirectional or dit.condition_attention=all), but a student "
            "learns each frame beside finished earlier ones"
        )
    if teacher.dit.condition == "tokens" and not teacher.dit.condition_tokens:
        return "it has no condition tokens of its own (dit.condition_tokens=0)"
    if teacher.diffusion.prediction == "eps":
        return "it predicts noise, from which clean latents cannot be told at the last timestep: train it with x0 or v"
    if teacher.diffusion.student is not None:
        return "it is a student itself: distill its own teacher"
    return None


def teacher_latents(config: DistillConfig, teacher: Teacher) -> LatentSet:
    """The stored latents as the teacher sees them: with its normalisation and its AR-VAE.

    Raises:
        ConfigError: Another AR-VAE made them, or their classes are not the teacher's.
    """
    latents = read_description(config.latents)
    if teacher.dit.num_classes and latents.class_names != teacher.class_names:
        raise ConfigError(
            f"The latents in {config.latents} have the classes {', '.join(latents.class_names)}, but the teacher "
            f"{teacher.uri} has {', '.join(teacher.class_names)}."
        )
    if latents.statistics != teacher.statistics and not _same_autoencoder(latents.vae, teacher.uri):
        raise ConfigError(
            f"The latents in {config.latents} were made by the AR-VAE {latents.vae}, which is not that of the teacher "
            f"{teacher.uri}: run `ardiff encode` with the teacher's AR-VAE, and use the folder that it prints."
        )
    return replace(
        latents, statistics=teacher.statistics, vae=teacher.uri, vae_fingerprint=vae_fingerprint(teacher.uri)
    )


def check_texts(texts: tuple[str, TextSet] | None, teacher: Teacher) -> None:
    """Raises ConfigError if another text encoder than the teacher's made the texts."""
    if texts is None or teacher.text_encoder is None:
        return
    folder, description = texts
    if description.encoder.fingerprint != teacher.text_encoder.fingerprint:
        raise ConfigError(
            f"The texts in {folder} were made by the text encoder {description.encoder.uri}, which is not that of the "
            f"teacher, {teacher.text_encoder.uri}: run `ardiff encode` with it, or choose one with text_encoder."
        )


def _same_autoencoder(vae: str, pipeline: str) -> bool:
    """Whether both folders hold the same weights of an AR-VAE. False if the first one is gone."""
    files = [storage.join(folder, "vae.safetensors") for folder in (vae, pipeline)]
    return all(map(storage.exists, files)) and storage.read_bytes(files[0]) == storage.read_bytes(files[1])
