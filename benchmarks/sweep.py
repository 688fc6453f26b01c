"""Cost of a sweep: mode `window` against `full`, and one actor against two, as ratios of one run.

    python benchmarks/sweep.py                 # 64 videos of 128 frames, four times: the table of docs/performance.md
    python benchmarks/sweep.py --seeds 1       # 16 videos each
    python benchmarks/sweep.py --no-full       # one actor and two only

The same grid is generated with `window` by one actor and by two actors of one thread each, and with `full` by two. Wall
time is from the start of the first batch to the end of the last video, as in the records: the start of Ray and of the
actors is left out. On a machine that others use too, read processor time.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace

from ardiff.data import storage
from ardiff.sampling.params import SamplingMode, SamplingParams
from ardiff.sweep.grid import GridConfig, SweepPoint, point_specs, sweep_points
from ardiff.sweep.models import SweptModel
from ardiff.sweep.specs import Record, VideoSpec, find_complete
from ardiff.sweep.summary import summarise
from ray_jobs import sweep
from ray_jobs.generation.config import SweepConfig
from ray_jobs.runtime.cluster import ray_cluster


def measure(config: SweepConfig) -> tuple[list[SweepPoint], list[VideoSpec], dict[str, Record]]:
    """Runs a sweep and returns its points, specs and records."""
    sweep.run(config)
    models = [SweptModel.load(uri) for uri in config.grid.checkpoints]
    points = sweep_points(config.grid, models, config.precision)
    specs = [spec for point in points for spec in point_specs(config.grid, point, config.files)]
    return points, specs, find_complete(specs, storage.absolute(config.output))


def wall(records: Sequence[Record]) -> float:
    return max(r.finished for r in records) - min(r.started for r in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="runs/quickstart/dit/pipeline")
    parser.add_argument("--seeds", type=int, default=4, help="videos of each class and ar_step")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--ar-steps", type=int, nargs="+", default=[2, 5, 10, 20])
    parser.add_argument("--no-full", action="store_true", help="leave mode full out")
    options = parser.parse_args()
    base = SamplingParams(num_frames=128, num_inference_steps=20, guidance_scale=options.guidance)
    runs: dict[str, tuple[SamplingMode, int]] = {"window, 1 actor": ("window", 1), "window, 2 actors": ("window", 2)}
    runs |= {} if options.no_full else {"full, 2 actors": ("full", 2)}
    by_run: dict[str, list[Record]] = {}
    cpu_seconds: dict[str, dict[int, float]] = {}
    hashes: dict[str, dict[SamplingParams, str]] = {}
    with tempfile.TemporaryDirectory() as folder, ray_cluster():
        for name, (mode, actors) in runs.items():
            grid = GridConfig(
                checkpoints=(options.pipeline,),
                sampling=replace(base, mode=mode),
                axes={"ar_step": options.ar_steps},
                seeds=options.seeds,
            )
            config = SweepConfig(
                grid=grid,
                output=f"{folder}/{mode}-{actors}",
                batch_size=options.batch_size,
                min_actors=actors,
                max_actors=actors,
            )
            points, specs, records = measure(config)
            by_run[name] = list(records.values())
            hashes[name] = {spec.sampling: records[spec.id].frames_sha256 for spec in specs}
            summaries = summarise(points, specs, records)
            cpu_seconds[name] = {s.point.params.resolved_ar_step: s.cpu_seconds for s in summaries}
    print(f"\nload of the machine over 15 minutes: {os.getloadavg()[2]:.1f} on {os.cpu_count()} cores\n")
    print("| sweep | videos | evaluations | wall s | CPU s | frames/s |\n|---|---|---|---|---|---|")
    for name, done in by_run.items():
        evaluations, processor = sum(r.evaluations for r in done), sum(r.cpu_seconds for r in done)
        rate = 128 * len(done) / wall(done)
        print(f"| {name} | {len(done)} | {evaluations:,} | {wall(done):.0f} | {processor:.0f} | {rate:.1f} |")
    one, two, *others = (by_run[name] for name in runs)
    speed, used = wall(one) / wall(two), [sum(r.cpu_seconds for r in records) for records in by_run.values()]
    print(f"\n1 actor / 2 actors: wall {speed:.2f}, efficiency {50 * speed:.0f} %, CPU {used[0] / used[1]:.2f}")
    busy = sum(r.seconds for r in two) / (2 * wall(two))
    print(f"two actors at work {100 * busy:.0f} % of the wall time")
    same = sum(hashes["window, 1 actor"][k] == v for k, v in hashes["window, 2 actors"].items())
    print(f"videos with the same frames from one actor and two: {same} of {len(two)}")
    for full in others:
        print(f"full / window, two actors: wall {wall(full) / wall(two):.2f}, CPU {used[2] / used[1]:.2f}")
        print("\n| ar_step | CPU s a video, window | full | ratio |\n|---|---|---|---|")
        for ar_step in options.ar_steps:
            fast, slow = (cpu_seconds[run][ar_step] for run in ("window, 2 actors", "full, 2 actors"))
            print(f"| {ar_step} | {fast:.2f} | {slow:.2f} | **{slow / fast:.2f}** |")


if __name__ == "__main__":
    main()
