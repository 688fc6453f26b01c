"""Deinterlacing: combs go, and every frame is the same wherever decoding starts."""

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from broken_videos import encode, rotated
from filtered_videos import INTERLACED_FILES, INTERLACED_FRAMES, interlaced, scene
from real_videos import changing_sizes

from ardiff.data.clips import read_clips, read_frames
from ardiff.data.decode import decode_clip, decode_frames
from ardiff.data.discovery import probe_record, reuse_probe, summarize, unprobed_record, with_filters
from ardiff.data.filters import deinterlaced, filters_for
from ardiff.data.manifest import VideoRecord
from ardiff.data.probe import probe
from ardiff.data.storage import find_file
from ardiff.errors import ClipTooShortError, DecodeError
from ardiff.resolution import Resolution

FILTERS = ("deinterlace",)


def combs(picture: np.ndarray) -> float:
    """How much lines differ from both of their neighbours in the same direction, as a mean over all pixels."""
    grey = picture.astype(float).mean(-1)
    above, below = grey[1:-1] - grey[:-2], grey[1:-1] - grey[2:]
    return float(np.where(above * below > 0, np.minimum(abs(above), abs(below)), 0).mean())


@pytest.mark.parametrize("name", INTERLACED_FILES)
def test_combs_are_gone_and_each_frame_shows_its_first_field(name: str) -> None:
    options = INTERLACED_FILES[name]
    data, progressive = interlaced(**options), options.get("progressive", ())
    assert probe(data).warnings == ("interlaced",)
    raw, clean = (decode_clip(data, 0, INTERLACED_FRAMES, filters=filters) for filters in ((), FILTERS))
    assert len(clean) == INTERLACED_FRAMES
    for number in range(INTERLACED_FRAMES):
        if number in progressive:
            assert np.array_equal(clean[number], raw[number]), number
            continue
        assert combs(raw[number]) > 2, number
        assert combs(clean[number]) < 0.5, number
        errors = [np.abs(p[number].astype(float) - scene(2 * number)).mean() for p in (raw, clean)]
        assert errors[1] < 0.5 * errors[0], number


@pytest.mark.parametrize("name", INTERLACED_FILES)
def test_frames_are_the_same_wherever_decoding_starts(name: str) -> None:
    data = interlaced(**INTERLACED_FILES[name])
    timing, last = probe(data).timing, INTERLACED_FRAMES - 1
    whole = decode_clip(data, 0, INTERLACED_FRAMES, filters=FILTERS)
    wanted = [[number] for number in range(INTERLACED_FRAMES)]
    wanted += [[0, 1], [last - 1, last], [2, 3, 4], [1, 4, 7, 10], [3, last], list(range(4, INTERLACED_FRAMES))]
    for numbers in wanted:
        for given in (timing, None):
            frames = decode_frames(data, numbers, None, given, FILTERS)
            assert list(frames) == numbers
            assert all(np.array_equal(frames[number], whole[number]) for number in numbers), numbers
    with pytest.raises(ClipTooShortError):
        decode_frames(data, [last, last + 1], None, timing, FILTERS)


def test_seeking_stays_seeking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip that begins with a key frame needs the frame before it, so the key frame before that."""
    data = interlaced(**INTERLACED_FILES["mpeg2"])
    timing = probe(data).timing
    wanted = [5, 10, INTERLACED_FRAMES - 1]
    expected = [decode_frames(data, [number], None, None, FILTERS)[number] for number in wanted]

    def refuse(*arguments: object) -> None:
        raise AssertionError("it is decoded from the beginning")

    monkeypatch.setattr("ardiff.data.decode._decode_from_beginning", refuse)
    for number, picture in zip(wanted, expected, strict=True):
        assert np.array_equal(decode_frames(data, [number], None, timing, FILTERS)[number], picture)


def test_a_single_frame_is_deinterlaced() -> None:
    data = interlaced(frames=1)
    [raw], [clean] = decode_clip(data, 0, 1), decode_clip(data, 0, 1, filters=FILTERS)
    assert combs(clean) < 0.5 < combs(raw)


def test_deinterlaced_frames_stand_upright() -> None:
    data = interlaced()
    upright = decode_clip(rotated(data), 0, 3, filters=FILTERS)
    assert np.array_equal(upright, np.rot90(decode_clip(data, 0, 3, filters=FILTERS), 3, axes=(1, 2)))


def test_progressive_videos_keep_their_bits() -> None:
    data = encode()
    assert np.array_equal(decode_clip(data, 3, 9, filters=("deinterlace", "tone_map")), decode_clip(data, 3, 9))


def test_a_size_that_changes_between_frames_is_an_error() -> None:
    with pytest.raises(DecodeError, match="change their size"):
        decode_clip(changing_sizes(), 0, 12, filters=FILTERS)
    frames = [av.VideoFrame(32, height, "yuv420p") for height in (32, 48)]
    with pytest.raises(DecodeError, match="change their size"):
        list(deinterlaced(enumerate(frames), [0, 1]))


def test_only_what_a_probe_warns_of_is_filtered() -> None:
    assert filters_for(("interlaced", "hdr"), "auto", "auto") == ("deinterlace", "tone_map")
    assert filters_for(("interlaced", "hdr"), "off", "auto") == ("tone_map",)
    assert filters_for(("interlaced", "hdr"), "off", "off") == filters_for((), "auto", "auto") == ()


def record_of_file(folder: Path, data: bytes) -> VideoRecord:
    (folder / "a.mp4").write_bytes(data)
    return probe_record(unprobed_record(find_file(str(folder / "a.mp4")), ("x", 0, "train")), 25.0)


def test_readers_of_clips_apply_the_filters_of_the_record(tmp_path: Path) -> None:
    data = interlaced(**INTERLACED_FILES["h264"])
    plain = record_of_file(tmp_path, data)
    assert with_filters(plain, "off", "auto") == plain
    filtered = with_filters(plain, "auto", "auto")
    assert filtered == replace(plain, filters="deinterlace")
    assert with_filters(filtered, "off", "off") == plain
    whole = decode_clip(data, 0, INTERLACED_FRAMES, filters=FILTERS)
    clips = read_clips(filtered, [range(2, 8, 2), [INTERLACED_FRAMES - 1]], 0.0, None)
    assert np.array_equal(clips[0], whole[2:8:2])
    assert np.array_equal(clips[1], whole[-1:])
    [[slow]] = read_frames(filtered, [[3]], 12.5, Resolution(32, 48))  # frame 6 at half the rate
    assert np.array_equal(slow, decode_frames(data, [6], Resolution(32, 48), None, FILTERS)[6])
    assert not np.array_equal(read_clips(plain, [[4]], 0.0, None)[0], whole[4:5])


def test_a_known_probe_takes_the_filters_of_the_new_run(tmp_path: Path) -> None:
    plain = record_of_file(tmp_path, interlaced())
    new = unprobed_record(find_file(plain.uri), ("x", 0, "train"))
    known = reuse_probe(new, with_filters(plain, "auto", "off"))
    assert with_filters(known, "off", "off") == plain


def test_the_summary_names_the_setting_or_what_it_has_done() -> None:
    video = VideoRecord("a", 1, "h264", 64, 48, 8.0, 20, 0, "x", "train", "ok", "", warnings="interlaced, hdr")
    lines = summarize([video, with_filters(video, "auto", "off")]).splitlines()
    assert "deinterlace: 1 interlaced" in lines
    assert any(line.startswith("warning: 1 interlaced: ") and "deinterlace=auto" in line for line in lines)
    assert any(line.startswith("warning: 2 hdr: ") and "tone_map=auto" in line for line in lines)
