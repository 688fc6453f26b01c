"""Generates videos as files, then streams a longer one frame by frame.

python examples/sample_and_stream.py runs/quickstart/dit/pipeline runs/example
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ardiff.pipeline import ARDiffusionPipeline


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes two videos, and every 8th frame of a stream."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("output", type=Path)
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    pipeline = ARDiffusionPipeline.from_pretrained(options.pipeline)
    print(pipeline.info)

    videos = pipeline(seed=[1, 2], num_frames=16, num_inference_steps=options.steps, output_type="mp4").frames
    for number, video in enumerate(videos):
        (options.output / f"{number}.mp4").write_bytes(video)

    # Each frame comes as soon as it is final; memory does not grow with their number.
    stream = pipeline.stream(seed=3, num_frames=options.frames, num_inference_steps=options.steps)
    for number, [frame] in enumerate(stream):
        if number % 8 == 0:
            Image.fromarray(frame.numpy()).save(options.output / f"frame-{number:04d}.png")


if __name__ == "__main__":
    main()
