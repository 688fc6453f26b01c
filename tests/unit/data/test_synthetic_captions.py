import numpy as np
import pytest

from ardiff.data.config import SyntheticConfig
from ardiff.data.synthetic import CLASSES, COLOURS, SIZES, SPEEDS, draw_scene, is_held_out
from ardiff.data.synthetic_captions import COLOUR_NAMES, WORDINGS, captions, read_caption

CONFIG = SyntheticConfig(captions=True)


def test_every_full_wording_is_read_back():
    scene = draw_scene(CONFIG, 2, "train")
    names = {"size": scene.size, "direction": scene.direction, "speed": scene.speed}
    for wording in WORDINGS:
        asked = read_caption(wording.format(shape=scene.shape, colour=COLOUR_NAMES[scene.colour], **names))
        assert (asked.shape, asked.colour) == (scene.shape, COLOUR_NAMES[scene.colour])
        assert (asked.size, asked.direction, asked.speed) == (scene.size, scene.direction, scene.speed)


def test_captions_of_a_video_differ_and_the_last_one_may_leave_attributes_open():
    scene = draw_scene(CONFIG, 2, "train")
    first, second, short = captions(scene, np.random.default_rng(0))
    assert len({first, second, short}) == 3
    assert read_caption(first) == read_caption(second)
    assert read_caption(short).shape == scene.shape
    assert read_caption("a red ring").direction is None
    assert read_caption("A RED, ring").colour == "red"
    assert read_caption("redder rings").colour is None


def test_a_scene_is_what_its_names_say():
    for index in range(24):
        scene = draw_scene(CONFIG, index, "train")
        assert scene.radius == CONFIG.radius * SIZES[scene.size]
        slowest, fastest = SPEEDS[scene.speed]
        assert slowest <= np.linalg.norm(scene.velocity) <= fastest
        vertical, horizontal = np.abs(scene.velocity) > 1e-9
        assert (
            scene.direction
            == {(0, 1): "left and right", (1, 0): "up and down", (1, 1): "diagonally"}[int(vertical), int(horizontal)]
        )


def test_training_videos_leave_a_colour_of_each_shape_out_and_half_of_the_test_videos_have_it():
    def held_out(split, count):
        scenes = [draw_scene(CONFIG, index, split) for index in range(count)]
        return [is_held_out(CLASSES.index(scene.shape), scene.colour) for scene in scenes]

    assert not any(held_out("train", 400))
    assert sum(held_out("test", 64)) == 32
    seen = {(s.shape, s.colour) for s in (draw_scene(CONFIG, i, "train") for i in range(400))}
    assert len(seen) == len(CLASSES) * (len(COLOURS) - 1)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_plain_set_names_no_attributes(split):
    plain = draw_scene(SyntheticConfig(), 3, split)
    assert (plain.size, plain.direction, plain.speed) == ("", "", "")
    assert plain.radius == SyntheticConfig().radius
