"""Scores of sets of features, without a cluster."""

import hashlib

import numpy as np
import pytest

from ardiff.metrics.distances import Frechet
from ardiff.metrics.features import VideoFeatures
from ardiff.metrics.protocol import Protocol
from ardiff.metrics.store import StoredClip
from ray_jobs.evaluation.config import EvaluateConfig
from ray_jobs.evaluation.estimates import BELOW_BASELINE, GeneratedSet, Reference, estimate_score
from ray_jobs.evaluation.features import Extracted

COUNT, WIDTH = 64, 4
PROTOCOL = Protocol(
    name="styleganv", metric="fvd", network="none", weights="none", feature="test", num_frames=16, stride=1,
    resolution="8x8", resize="none", value_range="none", codec_real="raw", codec_fake="raw", num_real=COUNT,
    num_fake=COUNT, ddof=0, real_split="folder", real_data="", choice="all",
)  # fmt: skip


def extracted(features: np.ndarray) -> Extracted:
    hashes = [hashlib.sha256(row.tobytes()).hexdigest() for row in features]
    rows = [StoredClip(i, f"video-{i}", 0, sha256, "", i) for i, sha256 in enumerate(hashes)]
    return VideoFeatures.wrap(features), rows


@pytest.mark.parametrize("from_reference", [False, True])
def test_reconstructions_have_no_warning_of_copies(monkeypatch: pytest.MonkeyPatch, from_reference: bool) -> None:
    """Reconstructions of the reference are near it by design; generated clips as near as that are copies."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    generator = np.random.default_rng(0)
    real = generator.normal(size=(2 * COUNT, 1, WIDTH))
    near = real[:COUNT] + generator.normal(scale=1e-3, size=(COUNT, 1, WIDTH))
    videos = [(f"video-{i}", 0) for i in range(2 * COUNT)]
    distance = Frechet(0)
    reference = Reference.of(COUNT, distance, videos, extracted(real))
    generated = GeneratedSet.of("set", "folder", extracted(near), from_reference)
    score = estimate_score(EvaluateConfig(), distance, PROTOCOL, reference, generated, None, "test")
    warnings = [note for note in score.notes if note.startswith("WARNING") or note == BELOW_BASELINE]
    assert score.score < (score.baseline or 0)
    if from_reference:
        assert (score.checks, warnings) == (None, [])
    else:
        assert score.checks is not None
        assert score.checks.near == 1.0
        assert any("They may be copies" in warning for warning in warnings)
        assert BELOW_BASELINE in warnings
