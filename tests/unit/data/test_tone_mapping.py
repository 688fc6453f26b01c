"""HDR to SDR: colours against values computed here from the published transfer functions, and against FFmpeg."""

import io
from fractions import Fraction

import av
import av.filter
import numpy as np
import pytest
from broken_videos import encode
from filtered_videos import PATCH, from_yuv, hdr, to_yuv
from real_videos import oriented

from ardiff.data.decode import decode_clip
from ardiff.data.probe import probe
from ardiff.data.tone_mapping import HLG, PQ, compress_highlights, pq_code, tone_map
from ardiff.errors import DecodeError
from ardiff.resolution import Resolution

FILTERS = ("tone_map",)
BT2020_TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
"""ITU-R BT.2087, of columns."""


def st2084(code: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084: cd/m2 of a code."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    root = code ** (1 / m2)
    return 10000 * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)


def st2084_code(luminance: np.ndarray) -> np.ndarray:
    """The code of cd/m2, by search in a fine table."""
    table = np.linspace(0, 1, 2**20)
    return np.interp(luminance, st2084(table), table)


def hlg(code: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100: cd/m2 of R'G'B' ``(n, 3)`` on a display of 1000 cd/m2."""
    scene = np.where(code <= 0.5, code**2 / 3, (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    luminance = scene @ [0.2627, 0.6780, 0.0593]
    return 1000 * scene * np.maximum(luminance, 1e-9)[:, None] ** 0.2


def bt2390(light: np.ndarray) -> np.ndarray:
    """The EETF from 1000 to 203 cd/m2 as a Hermite spline: its ends are the knee, of slope 1, and the peak, of 0."""
    e1 = np.minimum(st2084_code(light) / st2084_code(np.array(1000.0)), 1)
    peak = st2084_code(np.array(203.0)) / st2084_code(np.array(1000.0))
    knee = 1.5 * peak - 0.5
    t, width = (e1 - knee) / (1 - knee), 1 - knee
    spline = knee + width * t + (3 * (peak - knee) - 2 * width) * t**2 + (width - 2 * (peak - knee)) * t**3
    return st2084(np.where(e1 < knee, e1, spline) * st2084_code(np.array(1000.0)))


def expected(codes: np.ndarray, transfer: int) -> np.ndarray:
    """8-bit R'G'B' of BT.709 for 10-bit codes."""
    light = bt2390(st2084(codes) if transfer == PQ else hlg(codes))
    return 255 * np.clip(light @ BT2020_TO_BT709.T / 203, 0, 1) ** (1 / 2.4)


def patches(data: bytes, **options: object) -> np.ndarray:
    """The colours of a video of :func:`hdr`: uint8 ``(n, 3)``."""
    return decode_clip(data, 1, 1, **options)[0, PATCH // 2, PATCH // 2 :: PATCH]  # type: ignore[arg-type]


def colours(transfer: int) -> np.ndarray:
    """R'G'B' codes of greys and of colours of BT.709, as 10-bit YUV holds them."""
    greys = np.linspace(0, 1, 24)[:, None].repeat(3, 1)
    light = np.random.default_rng(0).uniform(0.05, 1, (200, 3)) ** 2 @ np.linalg.inv(BT2020_TO_BT709).T
    bright, dark = (
        (st2084_code(1000 * light), st2084_code(80 * light)) if transfer == PQ else (light**0.4, light**0.5 / 2)
    )
    return from_yuv(to_yuv(np.concatenate([greys, bright, dark]))).clip(0, 1)


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_known_colours_have_the_published_values(transfer: int) -> None:
    codes = colours(transfer)
    data = hdr(codes, transfer)
    assert probe(data).warnings == ("hdr",)
    mapped, raw = patches(data, filters=FILTERS), patches(data)
    error = np.abs(mapped - expected(codes, transfer))
    assert error.max() <= 2
    assert error.mean() < 0.5
    assert np.abs(raw - expected(codes, transfer)).mean() > 15  # what is seen without


def test_anchors_of_the_reports() -> None:
    """ITU-R BT.2408, table 1: HDR reference white is 203 cd/m2, at 58 % of PQ and 75 % of HLG."""
    assert st2084(np.array(0.58)) == pytest.approx(203, rel=0.02)
    assert hlg(np.full((1, 3), 0.75))[0, 0] == pytest.approx(203, rel=0.01)
    pq, of_hlg = (
        patches(hdr(np.full((1, 3), code), kind), filters=FILTERS) for code, kind in ((0.58, PQ), (0.75, HLG))
    )
    assert np.abs(pq.astype(int) - of_hlg).max() <= 1
    assert 225 < pq.min() <= pq.max() < 240
    steps = patches(hdr(np.linspace(0, 1, 40)[:, None].repeat(3, 1), HLG), filters=FILTERS).astype(int)
    assert (np.ptp(steps, axis=1) <= 1).all()  # greys are grey
    assert (np.diff(steps[:37, 0]) > 0).all()  # and all but the brightest differ
    assert (steps[0, 0], steps[-1, 0]) == (0, 255)


def test_light_below_the_knee_stays_as_it_is() -> None:
    code = pq_code(np.array([0.0, 1, 50, 85]))
    assert np.allclose(compress_highlights(code), code, rtol=1e-12)
    high = compress_highlights(pq_code(np.array([150.0, 203, 1000, 4000])))
    assert (np.diff(high[:3]) > 0).all()
    assert high[2] == high[3] == pytest.approx(pq_code(np.array(203.0)))


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_greys_below_the_knee_are_those_of_ffmpeg(transfer: int) -> None:
    """FFmpeg's filter scale clips at 203 cd/m2 instead of compressing, so darker greys must be equal."""
    codes = np.linspace(0, 0.48 if transfer == PQ else 0.55, 20)[:, None].repeat(3, 1)
    data = hdr(codes, transfer)
    with av.open(io.BytesIO(data)) as container:
        frame = next(container.decode(video=0))
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25))
    scale = graph.add("scale", out_transfer="bt709", out_primaries="bt709")
    graph.link_nodes(source, scale, graph.add("format", "rgb24"), graph.add("buffersink")).configure()
    graph.push(frame)
    theirs = graph.vpull().to_ndarray()[PATCH // 2, PATCH // 2 :: PATCH]
    assert np.abs(theirs.astype(int) - patches(data, filters=FILTERS)).max() <= 2
    assert theirs.max() > 150


def test_primaries_of_the_file_count() -> None:
    codes = st2084_code(np.array([[80.0, 5, 5]]))
    [wide], [p3], [narrow], [unknown] = (patches(hdr(codes, PQ, p), filters=FILTERS).astype(int) for p in (9, 12, 1, 2))
    linear = (80 / 203) ** (1 / 2.4) * 255
    assert np.abs(narrow[0] - linear) < 3
    assert wide[0] > p3[0] > narrow[0]
    assert wide[1] < narrow[1]
    assert np.array_equal(unknown, wide)
    with pytest.raises(DecodeError, match="colour primaries 4, which tone mapping does not support"):
        decode_clip(hdr(codes, PQ, 4), 0, 1, filters=FILTERS)
    with pytest.raises(ValueError, match="neither PQ nor HLG"):
        tone_map(np.zeros((1, 1, 3), np.uint16), 1, 9)


def test_scaled_and_ordinary_frames() -> None:
    data = hdr(colours(PQ)[20:24], PQ)
    small = decode_clip(data, 0, 3, resolution=Resolution(8, 8), filters=FILTERS)
    assert small.shape == (3, 8, 8, 3)
    assert small.dtype == np.uint8
    for sdr in (encode(), encode(pix_fmt="yuv420p10le"), oriented([0, 1, -1, 0])):
        assert np.array_equal(decode_clip(sdr, 0, 3, filters=FILTERS), decode_clip(sdr, 0, 3))
