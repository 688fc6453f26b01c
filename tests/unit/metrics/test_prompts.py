import numpy as np
import pytest

from ardiff.data.config import SyntheticConfig
from ardiff.data.decode import decode_clip
from ardiff.data.encode import encode_video
from ardiff.data.synthetic import draw_scene, render_scene
from ardiff.data.synthetic_captions import captions
from ardiff.metrics.prompts import PROMPT_MEASURES, prompt_measures
from ardiff.metrics.tracking import track
from ardiff.resolution import Resolution


@pytest.fixture(scope="module")
def scenes():
    config = SyntheticConfig(captions=True, num_long=0)
    return [draw_scene(config, index, "test") for index in range(24)]


@pytest.fixture(scope="module")
def videos(scenes):
    """Clips of the scenes as H.264, from frame 8 on."""
    return [
        decode_clip(encode_video(render_scene(Resolution.square(32), s, s.centres(24)), 8.0, crf=8), 8, 16)
        for s in scenes
    ]


def test_real_videos_follow_all_their_captions(scenes, videos):
    for index, (scene, video) in enumerate(zip(scenes, videos, strict=True)):
        for caption in captions(scene, np.random.default_rng(index)):
            measures = prompt_measures(track(video), caption, caption)
            assert tuple(measures) == PROMPT_MEASURES
            assert set(measures.values()) == {1.0}, (caption, measures)


def test_each_wrong_attribute_is_seen(videos):
    def follows(prompt):
        measures = prompt_measures(track(videos[0]), prompt, "a purple plus")
        return {name.removeprefix("prompt "): value for name, value in measures.items() if value != 1.0}

    assert follows("quickly a small red ring goes left and right") == {"shuffled prompt": 0.0}
    assert follows("quickly a small red square goes left and right") == {"followed": 0.0, "shuffled prompt": 0.0}
    wrong = "slowly a large blue ring goes up and down"
    assert set(follows(wrong)) == {"followed", "colour", "direction", "size", "speed", "shuffled prompt"}
    assert follows("") == {"shuffled prompt": 0.0}


def test_a_colour_that_flickers_is_counted_by_frames(scenes, videos):
    video = videos[0].copy()
    video[::4] = video[::4][..., ::-1]  # red becomes blue
    measures = prompt_measures(track(video), "a red ring", "a blue ring")
    assert measures["prompt followed"] == measures["prompt colour"] == 0.75
    assert measures["shuffled prompt"] == 0.25


def test_an_empty_video_follows_no_prompt():
    video = np.full((16, 32, 32, 3), 26, dtype=np.uint8)
    measures = prompt_measures(track(video), "a small red ring moves diagonally slowly", "a blue plus")
    assert set(measures.values()) == {0.0}
