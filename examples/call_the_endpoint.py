"""Requests a video from a running endpoint and downloads it.

ardiff serve --checkpoint runs/quickstart/dit/pipeline
python examples/call_the_endpoint.py http://127.0.0.1:8000 video.mp4 --frames 64
"""

import argparse
from collections.abc import Sequence

from ardiff.client import Client


def main(arguments: Sequence[str] | None = None) -> None:
    """Follows the job and writes the video."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("output")
    parser.add_argument("--key", help="API key, if the service has any")
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    client = Client(options.url, options.key)
    for model in client.models():
        print("model", model["id"])
    video = client.create(num_frames=options.frames, seed=options.seed)
    client.wait(video["id"], on_progress=lambda state: print(state["status"], f"{state['progress']} %"))
    client.download(video["id"], options.output)


if __name__ == "__main__":
    main()
