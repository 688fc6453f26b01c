"""The models of a sweep: what each can sample, and the fingerprint of its weights."""

from __future__ import annotations

from dataclasses import dataclass

from ardiff.data import storage
from ardiff.errors import CheckpointError
from ardiff.pipeline import ARDiffusionPipeline, read_info
from ardiff.pretrained import fingerprint_of, local_folder
from ardiff.sampling.params import ModelInfo


@dataclass(frozen=True, slots=True)
class SweptModel:
    """A pipeline without its weights in memory."""

    uri: str
    weights: str
    """Fingerprint of the pipeline's files; empty if only its configuration was read."""
    info: ModelInfo

    @classmethod
    def load(cls, uri: str) -> SweptModel:
        """Reads the whole pipeline once, to check that it is complete. Raises CheckpointError or StorageError."""
        with local_folder(uri) as folder:
            return cls(uri, fingerprint_of(str(folder)), ARDiffusionPipeline.from_pretrained(str(folder)).info)

    @classmethod
    def peek(cls, uri: str) -> SweptModel | None:
        """Reads the configuration of a pipeline on this machine; None if it is remote, missing or no pipeline."""
        if storage.is_remote(uri):
            return None
        try:
            return cls(uri, "", read_info(uri))
        except (CheckpointError, KeyError, TypeError):
            return None
