"""Every call of LiteLLM for videos that this service offers: ``python litellm_calls.py URL PICTURE FOLDER``.

Run by the Python of .venv-clients. An assertion that fails ends it with a traceback.
"""

import os
import sys
import time
from pathlib import Path

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it fetches a list of prices from another host

import litellm
from calls import rejected

url, picture = sys.argv[1], Path(sys.argv[2])
service = {"api_base": f"{url}/v1", "api_key": "none", "custom_llm_provider": "openai"}
short = {"num_inference_steps": 4, "fps": 4}


def finished(video: litellm.VideoObject) -> litellm.VideoObject:
    while video.status in ("queued", "in_progress"):
        time.sleep(0.2)
        video = litellm.video_status(video.id, **service)
    assert video.status == "completed", video
    return video


video = litellm.video_generation("ring", model="default", seconds="2", size="16x16", extra_body=short, **service)
video = finished(video)
assert (video.seconds, video.size, video.model, video.progress) == ("2", "16x16", "default", 100), video
assert isinstance(video.created_at, int)
assert b"moov" in litellm.video_content(video.id, **service)
assert litellm.video_content(video.id, variant="thumbnail", **service)[8:12] == b"WEBP"

with picture.open("rb") as file:
    continued = litellm.video_generation("disc", model="default", input_reference=file, extra_body=short, **service)
finished(continued)
longer = finished(litellm.video_extension(video_id=video.id, prompt="square", seconds="1", **service))
assert longer.seconds == "3"
error = rejected(litellm.BadRequestError, lambda: litellm.video_remix(video.id, prompt="disc", **service))
assert "extensions" in str(error)

page = litellm.video_list(limit=2, order="desc", **service)
assert (len(page["data"]), page["has_more"]) == (2, True), page
rest = litellm.video_list(after=page["last_id"], **service)
assert [(v["seconds"], v["status"]) for v in rest["data"]] == [("2", "completed")], rest
error = rejected(litellm.BadRequestError, lambda: litellm.video_generation("no such class", model="default", **service))
assert "classes 0..2" in str(error)
