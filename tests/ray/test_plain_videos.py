"""Plain MP4 files that FFmpeg's own sources draw and PyAV writes: from the real I3D weights to a comparison."""

import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import pytest

from ardiff.cli import main
from ardiff.errors import ArdiffError
from ardiff.metrics.scores import read_scores
from ardiff.metrics.weights import fetch

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SOURCES = {
    "gradients": "size=80x64:rate=8:speed=0.05:seed={seed}",
    "life": "size=80x64:rate=8:mold=10:life_color=orange:death_color=navy:seed={seed}",
    "mandelbrot": "size=80x64:rate=8:start_scale={scale}",
    "testsrc2": "size=80x64:rate=8",
}
"""Filters that draw videos, with their options."""
NOISE = ("noise", "alls=60:allf=t")


def frames(source: str, seed: int, *filters: tuple[str, str]) -> Iterator[av.VideoFrame]:
    """Frames of a source, in a hue that depends on the seed."""
    graph = av.filter.Graph()
    options = SOURCES[source].format(seed=seed, scale=0.5 + seed / 40)
    chain = [(source, options), ("hue", f"h={37 * seed % 360}"), *filters, ("format", "pix_fmts=yuv420p")]
    nodes = [graph.add(name, text) for name, text in chain] + [graph.add("buffersink")]
    for left, right in itertools.pairwise(nodes):
        left.link_to(right)
    graph.configure()
    for _ in range(20):
        yield graph.pull()


def write_videos(folder: Path, first_seed: int, *filters: tuple[str, str]) -> Path:
    """64 videos of 20 frames, 16 of each source in a folder of its own."""
    for number, source in enumerate(SOURCES):
        (folder / source).mkdir(parents=True)
        for i in range(16):
            with av.open(str(folder / source / f"{i}.mp4"), "w") as container:
                stream = container.add_stream("libx264", rate=8, options={"crf": "18"})
                stream.width, stream.height, stream.pix_fmt = 80, 64, "yuv420p"
                for index, frame in enumerate(frames(source, first_seed + 64 * number + i, *filters)):
                    frame.pts, frame.time_base = index, Fraction(1, 8)
                    container.mux(stream.encode(frame))
                container.mux(stream.encode(None))
    return folder


def test_from_weights_to_a_comparison(
    cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 real and 64 generated videos, and 64 noisy ones that must score worse, with the real FVD."""
    monkeypatch.setenv("ARDIFF_CACHE", str(tmp_path / "cache"))
    try:
        fetch("i3d")
    except ArdiffError as error:
        pytest.skip(f"THE REAL WEIGHTS ARE NOT TESTED: {error}")
    assert main(["weights", "fetch", "i3d"]) == 0
    real = write_videos(tmp_path / "real", 0)
    sets = {"near": write_videos(tmp_path / "near", 1000), "noisy": write_videos(tmp_path / "noisy", 1000, NOISE)}
    arguments = ["evaluate", "--real", str(real), "--metrics", "fvd,kvd", "--num-clips", "64"]
    for name, folder in sets.items():
        assert main([*arguments, "--fake", str(folder), "--output", str(tmp_path / "scores" / name)]) == 0
    scores = {(s.set, s.metric): s for name in sets for s in read_scores(str(tmp_path / "scores" / name))}
    near, noisy = scores["near", "fvd"], scores["noisy", "fvd"]
    assert noisy.score > 2 * near.score > 0
    assert near.low is not None
    assert near.low < near.score < (near.high or 0) < (noisy.low or 0)
    assert (near.baseline_num, near.protocol.num_real, near.protocol.num_fake) == (32, 64, 64)
    assert near.protocol.weights.startswith("d8922d739a2a"), "not the weights of the package"
    assert (near.protocol.codec_real, near.protocol.codec_fake) == ("h264", "h264")
    assert near.infinity is None, "64 videos are too few for 400 features"
    assert near.checks is not None
    assert noisy.checks is not None
    assert (near.checks.num_clips, near.checks.duplicates) == (32, 0)
    assert near.checks.coverage > 2 * noisy.checks.coverage
    assert scores["noisy", "kvd"].score > scores["near", "kvd"].score
    capfd.readouterr()
    assert main(["compare", *(str(tmp_path / "scores" / name) for name in ("noisy", "near"))]) == 0
    lines = capfd.readouterr().out.splitlines()
    rows = [line.split()[1] for line in lines if line.startswith(f"  {tmp_path}")]
    assert rows == ["near", "noisy", "near", "noisy"], "the better set comes first, for each metric"
