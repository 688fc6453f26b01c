"""Changes class or prompt of a video while a service generates it. Frames that have started keep theirs.

ardiff serve --checkpoint runs/quickstart/dit/pipeline
python examples/change_a_served_video.py http://127.0.0.1:8000 video.mp4 class_label=ring class_label=plus

The requests are POST, GET and PATCH on /v1/videos, which any HTTP client can send.
"""

import argparse
from collections.abc import Sequence

from ardiff.client import Client


def main(arguments: Sequence[str] | None = None) -> None:
    """Creates a video with the first condition, and sets the second as soon as the first frames are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("output")
    parser.add_argument("conditions", nargs=2, help="class_label=NAME, prompt=TEXT or guidance_scale=NUMBER")
    parser.add_argument("--key", help="API key, if the service has any")
    parser.add_argument("--frames", type=int, default=256)
    options = parser.parse_args(arguments)
    client = Client(options.url, options.key)
    first, second = ({name: value} for name, _, value in (text.partition("=") for text in options.conditions))
    video = client.create(**first, num_frames=options.frames, seed=1)
    changed = False

    def follow(state: dict[str, object]) -> None:
        nonlocal changed
        print(state["status"], f"{state['progress']} %")
        if state["progress"] and not changed:
            changed = True
            change = client.change(video["id"], **second)
            print("change:", change["status"], "from frame", change.get("from_frame"))

    client.wait(video["id"], on_progress=follow, seconds=0.1)
    client.download(video["id"], options.output)


if __name__ == "__main__":
    main()
