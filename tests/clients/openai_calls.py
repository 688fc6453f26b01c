"""Every call of the OpenAI SDK for videos that this service offers: ``python openai_calls.py URL PICTURE FOLDER``.

Run by the Python of .venv-clients. An assertion that fails ends it with a traceback.
"""

import sys
import warnings
from pathlib import Path

import openai
from calls import rejected

warnings.simplefilter("ignore", DeprecationWarning)
url, picture, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
short = {"num_inference_steps": 4, "fps": 4, "seed": 1}  # fields of our own, beside those of the SDK


# Models.
(model,) = client.models.list().data
assert client.models.retrieve(model.id) == model
assert isinstance(model.created, int)

# Create and poll: the prompt is a class.
video = client.videos.create_and_poll(prompt="ring", seconds="2", model=model.id, size="16x16", extra_body=short)
assert (video.status, video.progress, video.error) == ("completed", 100, None), video
assert (video.prompt, video.seconds, video.size, video.model) == ("ring", "2", "16x16", model.id)
assert (video.num_frames, video.class_label) == (8, 1)
times = (video.created_at, video.completed_at, video.expires_at)
assert all(isinstance(time, int) for time in times), times
assert client.videos.retrieve(video.id) == video

# The content and its variants.
content = client.videos.download_content(video.id)
content.write_to_file(folder / "video.mp4")
assert (folder / "video.mp4").stat().st_size == video.bytes
assert client.videos.download_content(video.id, variant="thumbnail").read()[8:12] == b"WEBP"
assert client.videos.download_content(video.id, variant="spritesheet").read()[:2] == b"\xff\xd8"
with client.videos.with_streaming_response.download_content(video.id) as streamed:
    assert b"".join(streamed.iter_bytes()) == content.read()

# A picture to continue.
continued = client.videos.create_and_poll(prompt="disc", input_reference=picture, extra_body=short)
assert (continued.status, continued.given_frames, continued.num_frames) == ("completed", 1, 16)

# A longer version, which is what extending means. This version of the SDK cannot send the id of a video.
longer = client.videos.extend(video=folder / "video.mp4", prompt="square", seconds="1")
longer = client.videos.poll(longer.id)
assert (longer.status, longer.num_frames, longer.given_frames) == ("completed", 16, 8)
error = rejected(openai.BadRequestError, lambda: client.videos.remix(video.id, prompt="disc"))
assert error.code == "not_supported"

# A retry with the same key makes no second job.
key = {"Idempotency-Key": "a-key-of-this-test"}
first, second = (client.videos.create(prompt="disc", seconds="1", extra_headers=key) for _ in range(2))
assert first.id == second.id
error = rejected(
    openai.UnprocessableEntityError, lambda: client.videos.create(prompt="ring", seconds="1", extra_headers=key)
)
assert error.param == "Idempotency-Key"

# Pages, in both orders.
ids = [v.id for v in client.videos.list(limit=2)]  # fetches all pages
assert len(ids) == len(set(ids)) == 4
page = client.videos.list(limit=2, order="asc")
assert page.has_next_page()
assert [v.id for v in page.data] == ids[:1:-1]
assert (page.first_id, page.last_id) == (ids[-1], ids[-2])
assert [v.id for v in client.videos.list(limit=10, after=ids[1])] == ids[2:]

# Errors.
error = rejected(openai.UnprocessableEntityError, lambda: client.videos.create(prompt="no such class"))
assert (error.code, error.param) == ("invalid_request", "prompt"), error
error = rejected(openai.NotFoundError, lambda: client.models.retrieve("sora-2"))
assert error.code == "not_found"

# Deleting, twice.
for video_id in ids:
    for _ in range(2):
        deleted = client.videos.delete(video_id)
        assert (deleted.id, deleted.deleted, deleted.object) == (video_id, True, "video.deleted")
assert client.videos.list().data == []
