"""The quick evaluation: scores sets of small synthetic videos against held-out real clips, with controls beside them.

The distance uses features of a seeded random network. It ranks sets of this data among each other and is not
comparable with published FVD numbers. Controls make it readable: as many other real clips, and real clips that are
damaged on purpose. If the weights of I3D are in the cache, FVD is computed too, on fewer clips and with shuffled frames
as its only control.

    python -m ray_jobs.evaluate_quick --real data/manifest.parquet --fake runs/videos --num-clips 64
"""

import sys
from typing import Any

from rich.markup import escape

from ardiff.cli import main
from ardiff.data import storage
from ardiff.metrics.scores import table, write_scores
from ray_jobs.evaluation.config import QuickConfig
from ray_jobs.evaluation.datasets import list_videos
from ray_jobs.evaluation.quick import BY_CONDITION, clip_sets, find_i3d, measure, to_parquet
from ray_jobs.evaluation.quick_scores import by_condition, compute_scores, summarize
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.console import print_line
from ray_jobs.runtime.stages import record_run, stage, versions

ALIASES = {"num_frames": "frames"}


def run(config: QuickConfig, key: str = "") -> dict[str, Any]:
    """Writes the scores, and returns the content of ``scores.json``.

    Beside the scores it has the means of all measurements by set: ``{"scores": [...], "sets": {name: {"distance": ...,
    ...}}, ...}``.

    Raises:
        ArdiffError: There are no held-out real clips, or a set has fewer videos than ``num_clips``.
    """
    i3d, datasets = find_i3d(config), [list_videos(uri) for uri in (config.real, *config.fake)]
    # Manifests are checked before Ray starts. The videos of a folder are probed on Ray.
    listed = clip_sets(config, datasets) if all(dataset.records is not None for dataset in datasets) else None
    with ray_cluster(), stage("evaluate", config.output, key) as record:
        record_run(config.output, config)
        sets = listed or clip_sets(config, datasets)
        frame = measure(config, sets, i3d)
        scores = compute_scores(config, frame, sets, datasets, i3d)
        storage.write_bytes(storage.join(config.output, "features.parquet"), to_parquet(frame))
        conditions = by_condition(frame).to_csv(index=False)
        storage.write_bytes(storage.join(config.output, BY_CONDITION), conditions.encode())
        content = write_scores(config.output, scores, versions(), summarize(scores))
        record.results = content
        print_line(escape(table([(score.set, score) for score in scores])))
    return content


if __name__ == "__main__":
    raise SystemExit(main(["evaluate-quick", *sys.argv[1:]]))
