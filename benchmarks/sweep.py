"""Cost of a sweep: the fast mode against the plain one, and one actor against two, as ratios of one run.

    python benchmarks/sweep.py                 # 64 videos of 128 frames, four times: the table of docs/performance.md
    python benchmarks/sweep.py --seeds 1       # 16 videos each
    python benchmarks/sweep.py --no-full       # one actor and two only

The same grid is made with `window` by one actor and by two actors of one thread each, and with `full` by two. Wall time
is from the first pack's beginning to the last video's end, as the records have it: Ray's and the actors' start is left
out. On a machine that others use too, read processor time.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence

from ardiff.data import storage
from ardiff.sweep.grid import GridConfig, cells_of, rows_of
from ardiff.sweep.models import SweptModel
from ardiff.sweep.rows import Record, VideoRow, find_complete
from ardiff.sweep.summary import summarise
from ray_jobs import sweep
from ray_jobs.runtime.cluster import ray_cluster


def measure(config: sweep.SweepConfig) -> tuple[list[VideoRow], dict[str, Record]]:
    """Makes a sweep and returns its rows and records."""
    sweep.run(config)
    models = [SweptModel.load(uri) for uri in config.grid.checkpoints]
    cells = cells_of(config.grid, models, config.mode, config.precision)
    rows = [row for cell in cells for row in rows_of(config.grid, cell, config.storing)]
    return rows, find_complete(rows, storage.absolute(config.output))


def wall(records: Sequence[Record]) -> float:
    return max(r.finished for r in records) - min(r.started for r in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="runs/quickstart/dit/pipeline")
    parser.add_argument("--seeds", type=int, default=4, help="videos of each class and ar_step")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--ar-steps", type=int, nargs="+", default=[2, 5, 10, 20])
    parser.add_argument("--no-full", action="store_true", help="leave the plain mode out")
    options = parser.parse_args()
    grid = GridConfig(
        checkpoints=(options.pipeline,),
        ar_steps=tuple(options.ar_steps),
        num_frames=(128,),
        num_inference_steps=(20,),
        guidance_scales=(options.guidance,),
        seeds=options.seeds,
    )
    runs = {"window, 1 actor": ("window", 1), "window, 2 actors": ("window", 2)}
    runs |= {} if options.no_full else {"full, 2 actors": ("full", 2)}
    found: dict[str, list[Record]] = {}
    by_cell: dict[str, dict[int, float]] = {}
    sums: dict[str, dict[tuple[int, int, int], str]] = {}
    with tempfile.TemporaryDirectory() as folder, ray_cluster():
        for name, (mode, actors) in runs.items():
            config = sweep.SweepConfig(
                grid=grid,
                output=f"{folder}/{mode}-{actors}",
                mode=mode,  # type: ignore[arg-type]
                batch_size=options.batch_size,
                min_actors=actors,
                max_actors=actors,
            )
            rows, records = measure(config)
            found[name] = list(records.values())
            sums[name] = {(r.ar_step, r.label, r.seed): records[r.id].frames_sha256 for r in rows}
            cells = cells_of(grid, [SweptModel.load(options.pipeline)], config.mode, config.precision)
            by_cell[name] = {s.cell.ar_step: s.cpu_seconds for s in summarise(cells, rows, records)}
    print(f"\nload of the machine over 15 minutes: {os.getloadavg()[2]:.1f} on {os.cpu_count()} cores\n")
    print("| sweep | videos | evaluations | wall s | CPU s | frames/s |\n|---|---|---|---|---|---|")
    for name, records in found.items():
        evaluations, processor = sum(r.evaluations for r in records), sum(r.cpu_seconds for r in records)
        rate = 128 * len(records) / wall(records)
        print(f"| {name} | {len(records)} | {evaluations:,} | {wall(records):.0f} | {processor:.0f} | {rate:.1f} |")
    one, two, *others = (found[name] for name in runs)
    speed, used = wall(one) / wall(two), [sum(r.cpu_seconds for r in records) for records in found.values()]
    print(f"\n1 actor / 2 actors: wall {speed:.2f}, efficiency {50 * speed:.0f} %, CPU {used[0] / used[1]:.2f}")
    busy = sum(r.seconds for r in two) / (2 * wall(two))
    print(f"two actors at work {100 * busy:.0f} % of the wall time")
    same = sum(sums["window, 1 actor"][k] == v for k, v in sums["window, 2 actors"].items())
    print(f"videos with the same frames from one actor and two: {same} of {len(two)}")
    for full in others:
        print(f"full / window, two actors: wall {wall(full) / wall(two):.2f}, CPU {used[2] / used[1]:.2f}")
        print("\n| ar_step | CPU s a video, window | full | ratio |\n|---|---|---|---|")
        for ar_step in options.ar_steps:
            fast, slow = by_cell["window, 2 actors"][ar_step], by_cell["full, 2 actors"][ar_step]
            print(f"| {ar_step} | {fast:.2f} | {slow:.2f} | **{slow / fast:.2f}** |")


if __name__ == "__main__":
    main()
