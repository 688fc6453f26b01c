"""A spec describes one video to generate; a record says how that went.

The frames depend only on the spec, so two jobs that generate the same spec write the same frames. The video is written
first, its record after it, each atomically. An interruption leaves specs without a record, which are generated again.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.encode import VideoCodec, file_suffix
from ardiff.sampling.params import SamplingParams
from ardiff.sweep.models import SweptModel

READERS = 16
"""Records that are read in parallel."""
MAX_SUBJECT = 100
"""Characters of a prompt in a report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputSettings:
    """Where videos are stored, and in which format."""

    output: str
    """Folder of the videos, latents and records."""
    fps: float
    codec: VideoCodec
    crf: int
    """Quality of the files; smaller is better."""
    keep_latents: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSpec:
    """One video to generate: everything that its frames depend on, and how and where it is stored."""

    id: str
    """Fingerprint of everything that the frames depend on."""
    point: str
    """Name of the sweep point; empty outside of a sweep."""
    checkpoint: str
    """Folder of the pipeline."""
    weights: str
    """Fingerprint of the pipeline's files."""
    precision: str
    sampling: SamplingParams
    class_name: str
    """Empty without a class."""
    fps: float
    codec: VideoCodec
    crf: int
    uri: str
    """File of the video."""
    latents: str
    """File of its latents; empty if they are not kept."""
    record: str
    """File of its record."""

    @property
    def subject(self) -> str:
        """What the video shows, in a few words: its class and its prompt; empty without both."""
        prompt = self.sampling.prompt and f"“{textwrap.shorten(self.sampling.prompt, MAX_SUBJECT, placeholder='…')}”"
        return ", ".join(filter(None, [self.class_name, prompt]))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VideoSpec:
        """The inverse of :func:`dataclasses.asdict`."""
        return cls(**{**values, "sampling": SamplingParams.from_dict(values["sampling"])})


def spec_id(weights: str, params: SamplingParams, precision: str) -> str:
    """16 hex digits that identify everything the frames depend on, except the rounding of different kinds of devices.

    Default values are left out, so that a new field of :class:`SamplingParams` changes no id.
    """
    return fingerprint(weights, params.changed(), precision)


def make_spec(
    model: SweptModel, params: SamplingParams, precision: str, output: OutputSettings, name: str, point: str = ""
) -> VideoSpec:
    """The spec of a video of ``model``; ``name`` is the path of its files in the output folder, without suffix."""
    root = storage.absolute(output.output)
    return VideoSpec(
        id=spec_id(model.weights, params, precision),
        point=point,
        checkpoint=storage.absolute(model.uri),
        weights=model.weights,
        precision=precision,
        sampling=params,
        class_name=model.info.class_name(params.class_label),
        fps=output.fps,
        codec=output.codec,
        crf=output.crf,
        uri=storage.join(root, "videos", f"{name}.{file_suffix(output.codec)}"),
        latents=storage.join(root, "latents", f"{name}.safetensors") if output.keep_latents else "",
        record=storage.join(root, "records", f"{name}.json"),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """The result of a spec."""

    id: str
    status: str
    """``ok`` or ``failed``."""
    file_size: int = 0
    """Bytes of the video file."""
    file_sha256: str = ""
    frames_sha256: str = ""
    """Hash of the raw frames, uint8 ``(F, H, W, 3)``, before encoding."""
    latents_size: int = 0
    """Bytes of the latents file; 0 without one."""
    seconds: float = 0.0
    """Time from noise to the stored file, divided by the videos of the batch."""
    cpu_seconds: float = 0.0
    """Processor time of the same, divided likewise."""
    started: float = 0.0
    """Start of the batch, in seconds since 1970 by the worker's clock."""
    finished: float = 0.0
    """When the video was stored."""
    frames_per_second: float = 0.0
    evaluations: int = 0
    """Evaluations of a frame by the model, both branches of guidance counted."""
    batch_size: int = 0
    """Videos that were generated together."""
    worker: str = ""
    """Machine and process."""
    device: str = ""
    attempts: int = 0
    error: str = ""
    """Class of the error; empty without one."""
    message: str = ""
    statistics: dict[str, list[float]] = field(default_factory=dict)
    """Statistics of each segment of the video; see :func:`ardiff.sweep.statistics.video_statistics`."""


def write_record(spec: VideoSpec, record: Record) -> None:
    """Writes the record of a spec. Raises StorageError."""
    content = json.dumps({"spec": asdict(spec), "record": asdict(record)}, indent=1)
    storage.write_bytes(spec.record, content.encode())


def read_record(spec: VideoSpec) -> Record | None:
    """The record of a spec; None if it is missing, damaged, or of another spec. Raises StorageError."""
    if not storage.exists(spec.record):
        return None
    try:
        record = Record(**json.loads(storage.read_bytes(spec.record))["record"])
    except (ValueError, KeyError, TypeError):
        return None
    return record if record.id == spec.id else None


def read_complete(spec: VideoSpec) -> Record | None:
    """The record of a spec if its status is ``ok`` and its files exist with the recorded sizes, else None."""
    record = read_record(spec)
    if record is None or record.status != "ok":
        return None
    files = [(spec.uri, record.file_size), *([(spec.latents, record.latents_size)] if spec.latents else [])]
    return record if all(storage.exists(uri) and storage.size(uri) == size for uri, size in files) else None


def find_complete(specs: Sequence[VideoSpec], folder: str) -> dict[str, Record]:
    """The records of complete specs, by id. Lists the folder and reads the listed records.

    Args:
        specs: Specs whose files all lie below ``folder``.
        folder: The output folder; it need not exist.

    Raises:
        StorageError: The folder cannot be listed or read.
    """
    sizes = {file.uri: file.size for file in storage.list_objects(folder)} if storage.exists(folder) else {}
    listed = [spec for spec in specs if spec.record in sizes and spec.uri in sizes]
    complete: dict[str, Record] = {}
    for spec, record in zip(listed, in_parallel(read_record, listed), strict=True):
        if record is None or record.status != "ok" or sizes[spec.uri] != record.file_size:
            continue
        if spec.latents and sizes.get(spec.latents) != record.latents_size:
            continue
        complete[spec.id] = record
    return complete


def in_parallel(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """``function`` of each item, in their order, in a few threads; for functions that wait for storage."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(function, items))
