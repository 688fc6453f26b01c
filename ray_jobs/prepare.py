"""Makes the manifest of a data set: probes all videos of a folder or S3 prefix, or draws the synthetic set.

python -m ray_jobs.prepare --config configs/quickstart/prepare.yaml
"""

import sys
from dataclasses import dataclass, field, replace
from typing import Any

import ray.data

from ardiff.cli import main
from ardiff.data import storage
from ardiff.data.decode import probe
from ardiff.data.manifest import VIDEO_SUFFIXES, Split, VideoRecord, class_and_split, usable, write_manifest
from ardiff.data.synthetic import SyntheticConfig, write_video
from ardiff.errors import DataError
from ray_jobs.common import progress_bar, ray_cluster, say, stage


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Where the videos are, and where their manifest goes."""

    source: str | None = None
    """Folder or ``s3://`` prefix of videos; without one the synthetic set is drawn into the output folder."""
    output: str = "runs/data"
    """Folder of the manifest, and of the synthetic videos."""
    test_fraction: float = 0.1
    """Share of videos held out, unless the source has train and test folders."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """Sizes of the synthetic set."""

    def __post_init__(self) -> None:
        if not 0.0 < self.test_fraction < 1.0:
            raise ValueError(f"test_fraction must be between 0 and 1, got {self.test_fraction}")

    @property
    def manifest(self) -> str:
        """Where the manifest is written."""
        return storage.join(self.output, "manifest.parquet")


def run(config: PrepareConfig, key: str = "") -> None:
    """Writes the manifest. Raises DataError if there is no video, or none that can be decoded."""
    found = None if config.source is None else _find(config, config.source)
    with ray_cluster(), stage("prepare", config.output, key) as record:
        records = _draw(config) if found is None else _probe(found)
        good = [r for r in records if r.status == "ok"]
        bad = [r for r in records if r.status != "ok"]
        for r in bad[:5]:
            say(f"[yellow]skipped[/] {r.uri}: {r.reason}")
        usable(records, "train", 1)
        write_manifest(config.manifest, records)
        classes = len({r.label for r in good})
        record.note = f"{len(good)} videos, {sum(r.num_frames for r in good)} frames, {classes} classes, {len(bad)} bad"


def _draw(config: PrepareConfig) -> list[VideoRecord]:
    synthetic, output = config.synthetic, storage.absolute(config.output)
    splits: list[tuple[Split, int]] = [("train", synthetic.num_train), ("test", synthetic.num_test)]
    todo = [{"split": split, "index": i} for split, count in splits for i in range(count)]

    def draw(row: dict[str, Any]) -> dict[str, Any]:
        return {"record": write_video(synthetic, output, int(row["index"]), row["split"])}

    return _records(ray.data.from_items(todo, override_num_blocks=min(32, len(todo))).map(draw), len(todo), "drawing")


def _find(config: PrepareConfig, source: str) -> list[dict[str, Any]]:
    """The videos below ``source``, each with its class and split. Raises DataError if there is none."""
    source = storage.absolute(source)
    uris = storage.list_files(source, VIDEO_SUFFIXES)
    if not uris:
        raise DataError(f"There is no video in {source} ({', '.join(VIDEO_SUFFIXES)} are looked for).")
    described = class_and_split([u[len(source.rstrip("/")) + 1 :] for u in uris], config.test_fraction)
    if len({split for _, _, split in described}) == 1:
        described = _hold_out(described)
    return [{"uri": u, "name": n, "label": i, "split": s} for u, (n, i, s) in zip(uris, described, strict=True)]


def _probe(found: list[dict[str, Any]]) -> list[VideoRecord]:
    blocks = min(max(len(found) // 4, 1), 512)
    return _records(ray.data.from_items(found, override_num_blocks=blocks).map(_probe_row), len(found), "probing")


def _hold_out(described: list[tuple[str, int, Split]]) -> list[tuple[str, int, Split]]:
    """Makes the last video of a one-sided small set the other side, so that both splits have one."""
    *rest, (name, label, split) = described
    other: Split = "test" if split == "train" else "train"
    return [*rest, (name, label, other)]


def _probe_row(row: dict[str, Any]) -> dict[str, Any]:
    record = VideoRecord(row["uri"], 0, "", 0, 0, 0.0, 0, int(row["label"]), row["name"], row["split"], "error", "")
    try:
        data = storage.read_bytes(row["uri"])
        found = probe(data)
    except DataError as error:
        return {"record": replace(record, reason=str(error))}
    return {
        "record": replace(
            record,
            size=len(data),
            codec=found.codec,
            width=found.width,
            height=found.height,
            fps=found.fps,
            num_frames=found.num_frames,
            status="ok",
        )
    }


def _records(dataset: ray.data.Dataset, total: int, what: str) -> list[VideoRecord]:
    records = []
    with progress_bar(what, total, "video") as bar:
        bar.update(0)
        for row in dataset.iter_rows():
            records.append(row["record"])
            bar.update(len(records))
    return records


if __name__ == "__main__":
    raise SystemExit(main(["prepare", *sys.argv[1:]]))
