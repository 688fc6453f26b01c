"""Statistics of clips and the plots of how they change."""

from dataclasses import replace

import numpy as np
import pytest

from ardiff.data.config import SyntheticConfig
from ardiff.data.synthetic import draw_scene, render_scene
from ardiff.metrics.drift import (
    SHAPE_STATISTICS,
    STATISTICS,
    Drift,
    DriftError,
    DriftReport,
    clip_statistics,
    colour_drift,
    content_colour,
    drift_errors,
    mean_shape_statistics,
    mean_statistics,
    shape_statistics,
)
from ardiff.resolution import Resolution
from ray_jobs.reports.drift import curves, draw, page


def test_statistics_of_known_clips() -> None:
    names = list(STATISTICS)
    flat = np.full((4, 8, 8, 3), 100, np.uint8)
    assert clip_statistics(flat).tolist() == [100.0, 0.0, 0.0, 0.0, 0.0]
    columns = flat.copy()
    columns[:, :, ::2] = 140  # stripes of 40 along x alone
    values = dict(zip(names, clip_statistics(columns), strict=True))
    assert values == pytest.approx({"brightness": 120, "contrast": 20, "saturation": 0, "sharpness": 20, "motion": 0})
    moving = columns.copy()
    moving[1::2] = moving[1::2, :, ::-1]  # stripes swap in every frame
    assert clip_statistics(moving)[names.index("motion")] == 40.0
    assert mean_statistics(np.stack([clip_statistics(flat), clip_statistics(moving)]))["motion"] == 20.0
    red = flat.copy()
    red[..., 0] = 160
    assert clip_statistics(red)[names.index("saturation")] == 60.0
    with pytest.raises(ValueError, match="expected a uint8 clip"):
        clip_statistics(flat[:1])


def report(shapes: bool = False) -> DriftReport:
    way = {name: [1.0, 2.0, 4.0] for name in STATISTICS}
    way |= {name: [1.0, 0.75, 0.5] for name in SHAPE_STATISTICS if shapes}
    colour = [0.0, 3.0, 12.5]
    error = {name: DriftError(2.5, 2.0, 3.0) for name in STATISTICS}
    sets = [
        Drift(name=n, fvd=[10.0, 20.0, 40.0 + i], statistics=way, colour=colour, error=error)
        for i, n in enumerate(("slow", "<fast>"))
    ]
    level = dict.fromkeys(way, 1.5)
    real = {name: DriftError(0.5, 0.25, 0.75) for name in STATISTICS}
    return DriftReport(
        sets=sets, real_fvd=5.0, real_statistics=level, real_error=real, num_clips=8, protocol="styleganv"
    )


def test_drift_errors_are_the_published_sum() -> None:
    """Three segments of two videos: relative changes from the first, with weights 2 and 1."""
    values = np.full((3, 2, 5), 10.0, np.float32)
    values[1, 0, 0], values[2, 0, 0] = 15.0, 8.0
    values[:, 1, 3] = (0.5, 2.5, 0.5)  # less than a grey level counts as one
    errors = drift_errors(values)
    assert errors[0].tolist() == pytest.approx([2 * 0.5 + 0.2, 0, 0, 0, 0])
    assert errors[1].tolist() == pytest.approx([0, 0, 0, 4.0, 0])
    brightness = DriftError.of(values)["brightness"]
    assert (brightness.mean, brightness.low) == (pytest.approx(0.6), 0.0)
    assert brightness.high == pytest.approx(0.6 + 12.7062 * 0.6, rel=1e-4)  # Student's quantile for two videos


def test_plots_show_every_set_and_real_clips_along_time() -> None:
    plots = curves(report())
    assert [plot.title for plot in plots] == ["FVD", *(name.capitalize() for name in STATISTICS), "Colour"]
    assert plots[0].series["slow"] == ([8.0, 24.0, 40.0], [10.0, 20.0, 40.0])
    assert plots[0].series["real vs real"][1] == [5.0] * 3
    assert plots[1].series["real"][1] == [1.5] * 3
    assert draw(report()).startswith(b"\x89PNG")
    html = page(report(), "seed: 0", {"torch": "2"})
    assert "slow: FVD 10.0 at the start, 40.0 at the end; colour moves by 12.5 grey levels." in html
    assert "<fast>" not in html
    assert "2.50 (2.00 .. 3.00)" in html
    assert "0.50 (0.25 .. 0.75)" in html


def test_synthetic_videos_have_plots_of_what_their_frames_show() -> None:
    plots = {plot.title: plot for plot in curves(report(shapes=True))}
    assert plots["Frame identity"].series["slow"][1] == [1.0, 0.75, 0.5]
    assert plots["Colour"].series["<fast>"][1] == [0.0, 3.0, 12.5]
    assert draw(report(shapes=True)).startswith(b"\x89PNG")
    assert "; frames of the asked class 100 % and 50 %; colour" in page(report(shapes=True), "seed: 0", {"torch": "2"})


def test_colour_is_that_of_the_content_and_drift_its_distance_from_the_start() -> None:
    clip = np.full((3, 16, 16, 3), 26, np.uint8)
    assert content_colour(clip).tolist() == [26.0, 26.0, 26.0]
    for frame in range(3):
        clip[frame, 4:9, 3 + frame : 8 + frame] = (200, 100, 26)
    assert content_colour(clip).tolist() == [200.0, 100.0, 26.0]
    colours = np.array([[[10.0, 0, 0], [0, 0, 0]], [[10.0, 3, 4], [0, 0, 0]], [[10.0, 3, 4], [0, 12, 5]]])
    assert colour_drift(colours) == pytest.approx([0.0, (25 / 2) ** 0.5, (194 / 2) ** 0.5])


def test_shapes_of_segments() -> None:
    """Rings that turn into pluses for the last quarter of the frames."""
    scene = draw_scene(SyntheticConfig(), 0, "train")
    ring, plus = (
        render_scene(Resolution.square(32), replace(scene, shape=shape), scene.centres(8)) for shape in ("ring", "plus")
    )
    turned = shape_statistics(np.concatenate([ring[:6], plus[6:]]))
    assert turned.tolist() == pytest.approx([0.75, 0.0, 0.0, 0.25, 6 / 7])
    means = mean_shape_statistics(np.stack([turned, shape_statistics(plus)]), [0, 3])
    assert means == pytest.approx({"frame identity": 0.875, "neighbours alike": (6 / 7 + 1) / 2})
