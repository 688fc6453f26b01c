"""Benchmarks the Frechet distance against SciPy's matrix root and torchmetrics' FID, and feature extraction.

    python benchmarks/metrics.py frechet
    python benchmarks/metrics.py fid         # the same features
    python benchmarks/metrics.py inception   # the same pictures and the same Inception, with extraction
    python benchmarks/metrics.py extraction  # seeded random weights take as long as real ones
    python benchmarks/metrics.py i3d         # I3D with fetched weights against its plain form, and by OpenVINO
    python benchmarks/metrics.py workers     # extraction by one and by two actors of a Ray Data job
    python benchmarks/metrics.py coverage    # how often the 95 % intervals are right; --size 400x256 for one size,
                                             # --scores 600 for further scores drawn from moments

The runs of a ratio alternate. Times are medians of CPU seconds. ``--quick`` uses smaller sizes.
"""

from __future__ import annotations

import argparse
import copy
import functools
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ardiff import onednn
from ardiff.data.manifest import VideoRecord
from ardiff.metrics.compiled import OpenVINO
from ardiff.metrics.distances import Frechet, Kernel, SetDistance
from ardiff.metrics.extractors import FeatureExtractor
from ardiff.metrics.frechet import Moments, fast_distance, frechet_distance, frechet_from_moments
from ardiff.metrics.registry import find_spec, metrics, set_specs
from ardiff.metrics.uncertainty import Resampling
from ardiff.metrics.weights import fill_network, find_state

SETS = ((400, 2048), (2048, 2048), (2048, 256))
QUICK = ((400, 512), (512, 512))
CASES = ("shifted", "scaled", "identical")
"""Pairs of sets whose distance has a closed form."""


def features(seed: int, count: int, width: int) -> np.ndarray:
    """Rows that resemble logits: correlated neighbours and a falling spectrum, float64."""
    x = np.random.default_rng(seed).standard_normal((count, width))
    x[:, 1:] += 0.5 * x[:, :-1]
    return x * 4.0 / (1.0 + 0.125 * np.arange(width))


def by_sqrtm(real: np.ndarray, fake: np.ndarray) -> float:
    """The formula with SciPy's matrix square root, as in most repositories."""
    from scipy.linalg import sqrtm

    first, second = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    root = sqrtm(first @ second)
    means = ((real.mean(axis=0) - fake.mean(axis=0)) ** 2).sum()
    return float(means + np.trace(first) + np.trace(second) - 2 * np.trace(root.real))


def timed(function: Callable[[], float]) -> tuple[float, float]:
    """The value, and the CPU seconds of this process, which depend little on other load."""
    started = time.process_time()
    value = function()
    return value, time.process_time() - started


def frechet(sizes: tuple[tuple[int, int], ...], chosen: list[str], repeats: int) -> None:
    """Times of both implementations, and their errors for distances with a closed form."""
    print("| features | clips | ardiff s | sqrtm s | ratio | error of ardiff | error of sqrtm |")
    print("|---|---|---|---|---|---|---|")
    for width, count in sizes:
        real = features(1, count, width)
        shift = ((np.arange(width) % 5) - 2.0) * 0.25
        known = [(real + shift, float((shift**2).sum())), (1.5 * real, _scaled(real)), (real, 0.0)]
        cases = [case for name, case in zip(CASES, known, strict=True) if name in chosen]
        ardiff_seconds: list[float] = []
        scipy_seconds: list[float] = []
        worst = [0.0, 0.0]
        for fake, exact in cases * repeats:
            for side, (function, seconds) in enumerate(((frechet_distance, ardiff_seconds), (by_sqrtm, scipy_seconds))):
                value, elapsed = timed(partial(function, real, fake))
                seconds.append(elapsed)
                worst[side] = max(worst[side], abs(value - exact))
        ratio = statistics.median(b / a for a, b in zip(ardiff_seconds, scipy_seconds, strict=True))
        medians = f"{statistics.median(ardiff_seconds):.2f} | {statistics.median(scipy_seconds):.2f}"
        print(f"| {width} | {count} | {medians} | **{ratio:.1f}** | {worst[0]:.1e} | {worst[1]:.1e} |")


def _scaled(real: np.ndarray) -> float:
    """The distance of a set to 1.5 times itself: ``0.25 (|mu|^2 + tr S)``."""
    return float(0.25 * ((real.mean(axis=0) ** 2).sum() + real.var(axis=0, ddof=1).sum()))


class Rows(torch.nn.Module):
    """An extractor for torchmetrics that returns its input, so that both implementations reduce the same features."""

    num_features = 2048

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


def reduction(side: str, width: int, count: int) -> None:
    """Reduces features in batches, in a process of its own. Prints the value, seconds and MiB of memory."""
    batches = [
        [torch.from_numpy(features(seed * 1000 + i, 64, width)).float() for i in range(count // 64)] for seed in (1, 2)
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if side == "ardiff":

        def run() -> float:
            sides = [torch.cat(batch).numpy() for batch in batches]
            return frechet_distance(sides[0], sides[1], ddof=1)
    elif side == "moments":

        def run() -> float:
            return frechet_from_moments(Moments.of_all(batches[0]), Moments.of_all(batches[1]))
    else:
        from torchmetrics.image.fid import FrechetInceptionDistance

        extractor = Rows()
        extractor.num_features = width
        metric = FrechetInceptionDistance(feature=extractor, input_img_size=(1, 1, width)).double()

        def run() -> float:
            for batch, real in zip(batches, (True, False), strict=True):
                for rows in batch:
                    metric.update(rows.double(), real=real)
            return float(metric.compute())

    value, seconds = timed(run)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{value!r} {seconds} {peak}")


def fid(quick: bool, repeats: int) -> None:
    """Reductions of the same features by torchmetrics and by ardiff, each in a process of its own."""
    print("| features | clips | by | distance | s | MiB above the features |")
    print("|---|---|---|---|---|---|")
    for width, count in ((512, 512),) if quick else ((400, 2048), (2048, 2048)):
        runs: dict[str, list[list[float]]] = {"ardiff": [], "moments": [], "torchmetrics": []}
        for _ in range(repeats):
            for side, results in runs.items():
                command = [sys.executable, __file__, "reduce", side, str(width), str(count)]
                results.append([float(x) for x in subprocess.check_output(command, text=True).split()])
        for side, results in runs.items():
            value, seconds, peak = (statistics.median(column) for column in zip(*results, strict=True))
            print(f"| {width} | {count} | {side} | {value:.6f} | {seconds:.2f} | {peak:.0f} |")


def extraction(quick: bool, repeats: int, device: str) -> None:
    """Clips per second of preprocessing and network, without decoding."""
    count = 1 if quick or device == "cpu" else 16
    clips = np.random.default_rng(0).integers(0, 256, (count, 16, 256, 256, 3), dtype=np.uint8)
    print("| protocol | metric | clips/s | s a clip |")
    print("|---|---|---|---|")
    specs = [(p, name, spec) for name, metric in metrics().items() for p, spec in set_specs(metric).items()]
    for protocol, name, spec in specs:
        if name == "kvd":
            continue  # the same features as FVD
        torch.manual_seed(0)
        extractor = FeatureExtractor(spec, spec.network.build().state_dict(), torch.device(device))
        extractor(clips)
        seconds = [timed(partial(_extracted, extractor, clips))[1] for _ in range(repeats)]
        rate = count / statistics.median(seconds)
        print(f"| {protocol} | {name} | {rate:.2f} | {1 / rate:.2f} |")


def i3d(repeats: int) -> None:
    """Seconds of one clip of 16 frames: plain, with maxima axis by axis, with folded normalisation, by OpenVINO."""
    from ardiff.metrics.networks.i3d import I3D, I3D_EXTRACTOR, _MaxPool, _same

    class Boxes(_MaxPool):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.max_pool3d(_same(x, self.kernel, self.stride), self.kernel, self.stride)

    torch.manual_seed(0)
    separable, clip = fill_network(I3D(), find_state("i3d")[0], "i3d"), torch.rand(1, 3, 16, 224, 224) * 2 - 1
    plain = copy.deepcopy(separable)
    for parent in list(plain.modules()):
        for name, module in parent.named_children():
            if isinstance(module, _MaxPool):
                setattr(parent, name, Boxes(module.kernel, module.stride))
    models = {"plain": plain, "separable maxima": separable}
    models["and folded"] = I3D_EXTRACTOR.prepare(copy.deepcopy(separable))
    assert I3D_EXTRACTOR.prepare_openvino is not None
    models["OpenVINO"] = OpenVINO(I3D_EXTRACTOR.prepare_openvino(copy.deepcopy(separable)))
    with FlopCounterMode(display=False) as counter:
        separable(clip)
    giga, peak = counter.get_total_flops() / 1e9, sgemm_peak()
    outputs = {name: model(clip) for name, model in models.items()}  # also a warm-up
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            seconds[name].append(timed(partial(_sum_of, model, clip))[1])
    print(f"{giga:.1f} GFLOP a clip; the fastest float32 product of this processor does {peak:.0f} GFLOP/s")
    print("| I3D | s a clip | ratio | share of that rate | largest relative difference |")
    print("|---|---|---|---|---|")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["plain"], values, strict=True))
        error = float((outputs[name] - outputs["plain"]).abs().max() / outputs["plain"].abs().max())
        seconds_a_clip = statistics.median(values)
        share = giga / seconds_a_clip / peak
        print(f"| {name} | {seconds_a_clip:.2f} | **{ratio:.2f}** | {share:.0%} | {error:.1e} |")


def sgemm_peak(size: int = 2048) -> float:
    """GFLOP/s of the fastest float32 matrix product: torch's own or oneDNN's, the best of five."""
    a = torch.rand(size, size)
    linear = torch.nn.Linear(size, size, bias=False).requires_grad_(False)
    products: list[Callable[[torch.Tensor], torch.Tensor]] = [linear]
    if onednn.available():
        products.append(onednn.PackedLinear(linear))
    for product in products:
        product(a)
    seconds = min(timed(partial(_sum_of, product, a))[1] for _ in range(5) for product in products)
    return 2 * size**3 / seconds / 1e9


def _sum_of(function: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> float:
    return float(function(values).sum())


def _inception() -> FeatureExtractor:
    from ardiff.metrics.networks.inception import FIDInception

    torch.manual_seed(0)
    model = FIDInception()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)  # so that pictures have different features
    return FeatureExtractor(find_spec("styleganv", "fid-img"), model.state_dict(), torch.device("cpu"))


def inception(quick: bool, repeats: int) -> None:
    """FID of two sets of pictures with the same Inception: by torchmetrics and by ardiff, with extraction."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    extractor, count = _inception(), 8 if quick else 64
    generator = np.random.default_rng(0)
    sets = [generator.integers(0, high, (count, 1, 256, 256, 3), dtype=np.uint8) for high in (256, 200)]

    class SameExtractor(torch.nn.Module):
        num_features = 2048

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(extractor(images.permute(0, 2, 3, 1)[:, None].numpy())[:, 0])

    def torchmetrics_fid() -> float:
        metric = FrechetInceptionDistance(feature=SameExtractor(), input_img_size=(3, 256, 256)).double()
        for pictures, real in zip(sets, (True, False), strict=True):
            for batch in torch.from_numpy(pictures[:, 0]).permute(0, 3, 1, 2).split(16):
                metric.update(batch, real=real)
        return float(metric.compute())

    def ardiff_fid() -> float:
        real, fake = (extractor(pictures)[:, 0].astype(np.float64) for pictures in sets)
        return frechet_distance(real, fake)

    results = [(timed(ardiff_fid), timed(torchmetrics_fid)) for _ in range(repeats)]
    ratio = statistics.median(b[1] / a[1] for a, b in results)
    print("| pictures a set | ardiff | torchmetrics | s, ardiff | s, torchmetrics | ratio |")
    print("|---|---|---|---|---|---|")
    (distance, seconds), (other, slower) = results[0]
    print(f"| {count} | {distance:.6g} | {other:.6g} | {seconds:.2f} | {slower:.2f} | **{ratio:.2f}** |")


def workers(quick: bool, repeats: int) -> None:
    """Wall time from files to I3D features, with one and with two actors of one thread each."""
    import tempfile
    from pathlib import Path

    from ardiff.data.encode import encode_video
    from ardiff.metrics.networks.i3d import I3D
    from ardiff.metrics.store import FeatureStore
    from ray_jobs.evaluation.datasets import Clip
    from ray_jobs.evaluation.features import ClipSet, Workers, extract
    from ray_jobs.runtime.cluster import ray_cluster

    torch.manual_seed(0)
    state = I3D().state_dict()

    def build(device: torch.device) -> Callable[[np.ndarray], np.ndarray]:
        torch.set_num_threads(1)
        return FeatureExtractor(find_spec("styleganv", "fvd"), state, device)

    count = 8 if quick else 48
    with tempfile.TemporaryDirectory() as folder, ray_cluster():
        clips = []
        for i in range(count):
            video = np.random.default_rng(i).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
            path = Path(folder) / f"{i:03d}.mp4"
            path.write_bytes(encode_video(video, 8.0))
            record = VideoRecord(str(path), path.stat().st_size, "h264", 64, 64, 8.0, 16, 0, "video", "test", "ok", "")
            clips.append(Clip(record, 0, 1))

        def seconds(actors: int, number: int) -> float:
            actor_pool = Workers(device=torch.device("cpu"), batch_size=2, max_actors=actors, cpus=1.0, gpus=1)
            store = FeatureStore(str(Path(folder) / f"{actors}-{number}"))
            started = time.perf_counter()
            extract("i3d", [ClipSet(clips, store)], build, 16, None, actor_pool)
            return time.perf_counter() - started

        seconds(2, -1)  # warm-up: starts the processes
        rows = [(seconds(1, number), seconds(2, number)) for number in range(repeats)]
    one, two = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median(a / b for a, b in rows)
    print("| clips | one actor, s | two actors, s | ratio | efficiency |")
    print("|---|---|---|---|---|")
    print(f"| {count} | {one:.1f} | {two:.1f} | **{ratio:.2f}** | {ratio / 2:.0%} |")


COVERAGE_SETS = ((400, 256), (400, 2048))
QUICK_COVERAGE_SETS = ((40, 64),)
SHIFTS = {"equal": 0.0, "shifted": 0.1}
"""The generated sets: draws of the real distribution, and of one of 1.1 times the spread and another mean."""


def drawn(seed: int, side: int, count: int, width: int, shift: float) -> np.ndarray:
    """A set of :func:`features`, ``(N, 1, D)``, changed by ``shift``."""
    rows = features(2 * seed + side, count, width)
    return (rows * (1.0 + shift) + shift * ((np.arange(width) % 5) - 2.0))[:, None]


def true_distance(width: int, shift: float) -> float:
    """The Frechet distance of the distributions: the covariances are multiples of each other."""
    mixing = np.eye(width) + 0.5 * np.eye(width, k=1)
    mixing = mixing * 4.0 / (1.0 + 0.125 * np.arange(width))
    return float((shift * ((np.arange(width) % 5) - 2.0) ** 2).sum() * shift + shift**2 * (mixing**2).sum())


def one_interval(seed: int, count: int, width: int, shift: float, distance: SetDistance) -> tuple[float | None, ...]:
    """Score, interval, extrapolation and its interval, of one pair of sets."""
    real, fake = drawn(seed, 0, count, width, 0.0), drawn(seed, 1, count, width, shift)
    names = [str(i) for i in range(count)]
    resampling = Resampling(distance=distance, partitions=16, seed=seed, real_videos=names, fake_videos=names)
    score = distance(real, fake)
    u = resampling.summarize(score, width, [draw(real, fake) for draw in resampling.draws()])
    return score, u.low, u.high, u.infinity, u.infinity_low, u.infinity_high


def drawn_moments(generator: np.random.Generator, count: int, width: int, shift: float) -> Moments:
    """The moments of a set as :func:`drawn` makes it, without its rows: the scatter has a Wishart distribution.

    Its root is drawn as Bartlett (1933) does, from ``width^2 / 2`` numbers instead of ``count width``.
    """
    mixing = (np.eye(width) + 0.5 * np.eye(width, k=1)) * 4.0 / (1.0 + 0.125 * np.arange(width))
    mixing *= 1.0 + shift  # rows of a set are normal rows times the mixing
    triangle = np.tril(generator.standard_normal((width, width)), -1)
    triangle[np.diag_indices(width)] = np.sqrt(generator.chisquare(count - 1 - np.arange(width)))
    root = mixing.T @ triangle
    mean = shift * ((np.arange(width) % 5) - 2.0) + generator.standard_normal(width) @ mixing / np.sqrt(count)
    return Moments(count, mean, root @ root.T)


def one_score(seed: int, count: int, width: int, shift: float) -> float:
    """The Frechet distance of another pair of sets, of more rows than features, from moments alone."""
    generator = np.random.default_rng([seed, 1])
    real, fake = drawn_moments(generator, count, width, 0.0), drawn_moments(generator, count, width, shift)
    return fast_distance(real, fake, 0)


COVERED: dict[str, SetDistance] = {"Frechet": Frechet(0), "kernel": Kernel()}


def coverage(sizes: tuple[tuple[int, int], ...], distances: list[str], repeats: int, scores: int) -> None:
    """How often an interval has the mean score of its N, and that of N to infinity the true distance.

    With ``scores``, Frechet distances of as many further pairs are drawn from moments, which is a hundred times as
    fast as an interval. Every interval's reach is then compared with every one of these scores, as if the two were
    independent: few intervals give a precise rate.
    """
    print(
        "| distance | features | N | sets | pairs | mean score | interval is right | width / true | of all scores "
        "| true | N to inf | right |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    with ProcessPoolExecutor(2) as pool:
        for width, count in sizes:
            for name, distance in ((name, COVERED[name]) for name in distances):
                for label, shift in SHIFTS.items():
                    one = functools.partial(one_interval, count=count, width=width, shift=shift, distance=distance)
                    further: list[float] = []
                    if scores and name == "Frechet" and count > width:
                        other = functools.partial(one_score, count=count, width=width, shift=shift)
                        further = list(pool.map(other, range(scores), chunksize=16))
                    rows = []
                    for row in pool.map(one, range(repeats)):
                        rows.append(row)
                        if len(rows) in (repeats, *range(20, repeats, 20)):
                            truth = true_distance(width, shift)
                            cells = _coverage_cells(np.array(rows, dtype=float), np.array(further), truth)
                            end = "\r" if len(rows) < repeats and sys.stdout.isatty() else "\n"
                            print(
                                f"| {name} | {width} | {count} | {label} | {len(rows)} | {cells}", end=end, flush=True
                            )


def _coverage_cells(rows: np.ndarray, further: np.ndarray, truth: float) -> str:
    """The cells of pairs' scores and intervals, ``(R, 6)``, and of further scores, ``(S,)``, perhaps none."""
    scores, low, high, infinity, infinity_low, infinity_high = rows.T
    all_scores = further if further.size else scores
    mean = max(all_scores.mean(), 0.0)  # the kernel distance of equal distributions is 0
    right, reach = ((low <= mean) & (mean <= high)).mean(), high - scores
    wide = reach.mean() / (1.96 * all_scores.std(ddof=1))
    crossed = (np.abs(all_scores - mean)[:, None] <= reach).mean()
    cells = f"{mean:.4g} | {right:.1%} | {wide:.2f} | {f'{crossed:.1%}' if further.size else ''}"
    if not np.isfinite(infinity).all():
        return f"{cells} | | | |"
    right = ((infinity_low <= truth) & (truth <= infinity_high)).mean()
    return f"{cells} | {truth:.3f} | {infinity.mean():.3f} | {right:.1%} |"


def _extracted(extractor: Callable[[np.ndarray], np.ndarray], clips: np.ndarray) -> float:
    return float(extractor(clips).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", choices=("frechet", "fid", "inception", "extraction", "i3d", "workers", "coverage", "reduce")
    )
    parser.add_argument("reduce", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scores", type=int, default=0, help="for coverage: further Frechet distances, from moments")
    parser.add_argument("--size", default="all", help="for frechet and coverage: features x clips, such as 400x256")
    parser.add_argument("--case", action="append", choices=CASES, help="for frechet: such pairs alone")
    parser.add_argument("--distance", action="append", choices=COVERED, help="for coverage: this distance alone")
    parser.add_argument("--device", default="cpu", help="for extraction")
    options = parser.parse_args()

    def chosen(offered: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        return tuple(size for size in offered if options.size in ("all", f"{size[0]}x{size[1]}"))

    match options.what:
        case "frechet":
            frechet(chosen(QUICK if options.quick else SETS), options.case or list(CASES), options.repeats)
        case "fid":
            fid(options.quick, options.repeats)
        case "inception":
            inception(options.quick, options.repeats)
        case "coverage":
            sizes = chosen(QUICK_COVERAGE_SETS if options.quick else COVERAGE_SETS)
            coverage(sizes, options.distance or list(COVERED), options.repeats, options.scores)
        case "i3d":
            i3d(options.repeats)
        case "workers":
            workers(options.quick, options.repeats)
        case "extraction":
            extraction(options.quick, options.repeats, options.device)
        case _:
            side, width, count = options.reduce
            reduction(side, int(width), int(count))


if __name__ == "__main__":
    main()
