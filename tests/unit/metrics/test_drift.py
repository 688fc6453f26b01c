"""Statistics of clips and the plots of how they change."""

import numpy as np
import pytest

from ardiff.metrics.drift import STATISTICS, Drift, DriftReport, clip_statistics, mean_statistics
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


def report() -> DriftReport:
    way = {name: [1.0, 2.0, 4.0] for name in STATISTICS}
    sets = [Drift(name=n, fvd=[10.0, 20.0, 40.0 + i], statistics=way) for i, n in enumerate(("slow", "<fast>"))]
    level = dict.fromkeys(STATISTICS, 1.5)
    return DriftReport(sets=sets, real_fvd=5.0, real_statistics=level, num_clips=8, protocol="styleganv")


def test_plots_show_every_set_and_real_clips_along_time() -> None:
    plots = curves(report())
    assert [plot.title for plot in plots] == ["FVD", *(name.capitalize() for name in STATISTICS)]
    assert plots[0].series["slow"] == ([8.0, 24.0, 40.0], [10.0, 20.0, 40.0])
    assert plots[0].series["real vs real"][1] == [5.0] * 3
    assert plots[1].series["real"][1] == [1.5] * 3
    assert draw(report()).startswith(b"\x89PNG")
    html = page(report(), "seed: 0", {"torch": "2"})
    assert "slow: FVD 10.0 at the start, 40.0 at the end." in html
    assert "<fast>" not in html
