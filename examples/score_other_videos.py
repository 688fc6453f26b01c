"""Scores the videos of any model against real ones: two folders of videos.

python examples/score_other_videos.py real_videos generated_videos runs/scores --metrics fvd,frame-difference

`ardiff weights fetch i3d` gets the network of FVD; frame-difference needs no weights.
"""

import argparse
from collections.abc import Sequence

from ardiff.metrics.scores import describe_protocol, read_scores
from ray_jobs import evaluate
from ray_jobs.evaluation.config import EvaluateConfig
from ray_jobs.runtime.cluster import ray_cluster


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints each score with its interval, its real-vs-real baseline and its protocol."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("real")
    parser.add_argument("generated")
    parser.add_argument("output")
    parser.add_argument("--metrics", default="frame-difference")
    parser.add_argument("--num-clips", type=int, default=256)
    parser.add_argument("--num-frames", type=int, default=16)
    options = parser.parse_args(arguments)
    config = EvaluateConfig(
        real=options.real,
        fake=(options.generated,),
        output=options.output,
        metrics=tuple(options.metrics.split(",")),
        num_clips=options.num_clips,
        num_frames=options.num_frames,
    )
    with ray_cluster():
        evaluate.run(config)
    for s in read_scores(options.output):
        print(f"{s.metric} {s.score:.3f}, 95 % interval {s.low} to {s.high}, real vs real {s.baseline}")
        print(f"  {describe_protocol(s.protocol)}")


if __name__ == "__main__":
    main()
