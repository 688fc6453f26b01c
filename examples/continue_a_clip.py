"""Continues a video: its last frames are the first ones of the new video.

python examples/continue_a_clip.py runs/quickstart/dit/pipeline clip.mp4 longer.mp4 --given 4 --frames 32
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from ardiff.data.decode import decode_clip
from ardiff.data.probe import probe
from ardiff.pipeline import ARDiffusionPipeline


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the new video, whose given frames are as the AR-VAE reconstructs them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("clip", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--given", type=int, default=4, help="frames that are taken from the end of the clip")
    parser.add_argument("--frames", type=int, default=32, help="frames of the new video, given ones included")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    pipeline = ARDiffusionPipeline.from_pretrained(options.pipeline)

    file = options.clip.read_bytes()
    start = probe(file).num_frames - options.given
    given = decode_clip(file, start, options.given, resolution=pipeline.info.resolution)
    [video] = pipeline(
        condition=torch.from_numpy(given),
        num_frames=options.frames,
        num_inference_steps=options.steps,
        output_type="mp4",
    ).frames
    options.output.write_bytes(video)


if __name__ == "__main__":
    main()
