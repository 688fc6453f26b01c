"""Changes class or prompt while a video is generated. Frames that have started keep theirs.

python examples/change_the_condition.py runs/quickstart/dit/pipeline video.mp4 class_label=ring class_label=plus
python examples/change_the_condition.py runs/quickstart/dit/pipeline video.mp4 "prompt=a red disc" "prompt=a blue ring"

A video of a service changes with `ardiff client change ID --class-label plus`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ardiff.data.encode import encode_video
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.sampling.control import LiveControl


def main(arguments: Sequence[str] | None = None) -> None:
    """Streams a video with the first condition, and sets the others at equal distances."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("output", type=Path)
    parser.add_argument("conditions", nargs="+", help="class_label=NAME or prompt=TEXT")
    parser.add_argument("--frames", type=int, default=96)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    pipeline = ARDiffusionPipeline.from_pretrained(options.pipeline)
    changes: list[dict[str, Any]] = []
    for condition in options.conditions:
        name, _, value = condition.partition("=")
        known = value in pipeline.class_names if name == "class_label" else name == "prompt" and value
        if not known:
            parser.error(f"{condition} is neither prompt=TEXT nor class_label= one of {pipeline.class_names}")
        changes.append({name: pipeline.class_names.index(value) if name == "class_label" else value})

    control = LiveControl()
    stream = pipeline.stream(
        **changes[0], seed=1, num_frames=options.frames, num_inference_steps=options.steps, control=control
    )
    frames, distance = [], options.frames // len(changes)
    for frame in stream:
        frames.append(frame)
        if len(frames) % distance == 0 and len(frames) // distance < len(changes):
            first = control.set(**changes[len(frames) // distance])
            print(f"{options.conditions[len(frames) // distance]} from frame {first} on")
    options.output.write_bytes(encode_video(torch.cat(frames).numpy(), fps=8))


if __name__ == "__main__":
    main()
