"""Requests a video from a running endpoint with the OpenAI SDK (pip install openai).

ardiff serve --checkpoint runs/quickstart/dit/pipeline
python examples/use_the_openai_sdk.py http://127.0.0.1:8000 video.mp4 --prompt ring --seconds 4
"""

import argparse
import sys
import warnings
from collections.abc import Sequence

import openai


def main(arguments: Sequence[str] | None = None) -> None:
    """Creates a video, waits for it and downloads it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("output")
    parser.add_argument("--key", default="none", help="API key, if the service has any")
    parser.add_argument("--prompt", required=True, help="for a model with classes, the name of a class")
    parser.add_argument("--seconds", default="4")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", DeprecationWarning)  # of the SDK, about OpenAI's own service
    client = openai.OpenAI(base_url=f"{options.url}/v1", api_key=options.key)
    for model in client.models.list():
        print("model", model.id)
    # Sampling parameters are fields beside those of the SDK.
    extra = {"seed": options.seed, "fps": 8, "num_inference_steps": 20}
    try:
        video = client.videos.create_and_poll(prompt=options.prompt, seconds=options.seconds, extra_body=extra)
    except openai.APIStatusError as error:
        sys.exit(error.message)
    if video.error is not None:
        sys.exit(f"{video.status}: {video.error.message}")
    client.videos.download_content(video.id).write_to_file(options.output)
    print(f"{options.output}: {video.status}, {video.seconds} s")


if __name__ == "__main__":
    main()
