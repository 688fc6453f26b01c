"""The share of captions in the CPU time of ``ardiff encode``, at the quickstart's sizes.

    ardiff weights fetch text-minilm
    python benchmarks/text.py [--captions 1024] [--sample 128] [--dtype bfloat16]

The quickstart encodes 5,600 clips of 16 frames of 32 x 32 pixels. One process decodes and encodes a sample of them, as
the tasks and the actor of the job do; another encodes all distinct captions. Both include the
model, that of captions also the import of transformers.
Prints the table of docs/performance.md. Other load on the machine changes seconds, but hardly their ratio.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLIPS = 5600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=1024, help="distinct captions")
    parser.add_argument("--sample", type=int, default=128, help="clips that are encoded")
    parser.add_argument("--encoder", default="text-minilm")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the encoder's weights")
    parser.add_argument("--measure", choices=("clips", "captions"), help="what this process measures")
    arguments = parser.parse_args()
    match arguments.measure:
        case "clips":
            print(*encode_clips(arguments.sample))
            return 0
        case "captions":
            print(*encode_captions(arguments.encoder, arguments.dtype, arguments.captions))
            return 0
    print("| | number | start, CPU s | each, CPU ms | all, CPU s | share |\n|---|---|---|---|---|---|")
    rows = []
    for name, count in (("clips", CLIPS), ("captions", arguments.captions)):
        command = [sys.executable, __file__, "--measure", name, *sys.argv[1:]]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        start, each = map(float, output.split()[-2:])
        rows.append((name, count, start, each, start + count * each))
    for name, count, start, each, seconds in rows:
        share = seconds / sum(row[-1] for row in rows)
        print(f"| {name} | {count} | {start:.1f} | {1e3 * each:.2f} | {seconds:.0f} | **{share:.1%}** |")
    return 0


def encode_clips(count: int) -> tuple[float, float]:
    """CPU seconds until a process can encode, and of each clip, decoding included."""
    import numpy as np

    from ardiff.config import load_config
    from ardiff.data.clips import read_clips
    from ardiff.data.config import SyntheticConfig
    from ardiff.data.synthetic_set import write_video
    from ardiff.pretrained import save_autoencoder
    from ardiff.resolution import Resolution
    from ardiff.vae import ARAutoencoder
    from ray_jobs.encode import _Encoder
    from ray_jobs.training.config import TrainVAEConfig

    with tempfile.TemporaryDirectory() as folder:
        config = load_config(TrainVAEConfig, [Path(__file__).parents[1] / "configs" / "quickstart" / "train_vae.yaml"])
        save_autoencoder(f"{folder}/vae", ARAutoencoder(config.vae))
        videos = [write_video(SyntheticConfig(), folder, index, "train") for index in range(32, 32 + count // 4)]
        prepared = time.process_time()
        encoder = _Encoder(f"{folder}/vae", "cpu")
        encoder({"video": np.zeros((1, 16, 32, 32, 3), np.uint8)})
        started = time.process_time()
        for video in videos:
            starts = [list(range(start, start + 16)) for start in (0, 8, 16, 24)]
            encoder({"video": np.stack(read_clips(video, starts, 0.0, Resolution.square(32)))})
        each = (time.process_time() - started) / (4 * len(videos))
    return started - prepared, each


def encode_captions(uri: str, dtype: str, count: int) -> tuple[float, float]:
    """CPU seconds until a process can encode, and of each caption."""
    import torch

    from ardiff.text.encoder import TextEncoder

    words = [
        ("a", "one", "the only"),
        ("small", "large"),
        ("red", "green", "blue", "yellow", "pink", "white"),
        ("ring", "square", "triangle", "plus"),
        ("moves", "bounces", "drifts"),
        ("left and right", "up and down", "diagonally"),
        ("slowly", "quickly"),
    ]
    captions = [" ".join(each) for each in itertools.islice(itertools.product(*words), count)]
    prepared = time.process_time()
    encoder = TextEncoder.load(uri, dtype=getattr(torch, dtype))
    encoder(captions[:1])
    started = time.process_time()
    encoder.stored_states(captions, 64)
    return started - prepared, (time.process_time() - started) / len(captions)


if __name__ == "__main__":
    raise SystemExit(main())
