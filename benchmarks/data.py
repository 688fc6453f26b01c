"""Loading clips: Ray Data against a plain PyAV loop, S3 against local files, ranges against whole files, and memory.

    python benchmarks/data.py [--part decode|probe|filters|storage|ranges|memory|tables] [--quick]

``decode``: frames per core-second, decoded and resized, of 256 x 256 H.264 files, for Ray Data with a trainer that does
nothing and for one process that reads, decodes and resizes in a loop. ``probe``: finding out the frames of files by
decoding and by counting packets. ``filters``: decoding with deinterlacing and with tone mapping against decoding alone.
``storage``: reading and decoding from S3 and from disk. ``ranges``: a clip of a long video, read by ranges and as a
whole file. ``memory``: peak memory of all processes, and bytes spilled by the object store, for a data set and for one
ten times its size. ``tables``: peak memory of a process that writes a row group of videos as files. The S3 server is
that of the tests. Prints the tables of docs/performance.md, and a figure of docs/data.md. Other load on the machine
changes seconds, but hardly changes ratios of CPU time.
"""

import argparse
import contextlib
import importlib
import io
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ardiff.data import storage
from ardiff.data.config import ClipConfig
from ardiff.data.decode import decode_frames
from ardiff.data.manifest import VideoRecord, manifest_table
from ardiff.data.probe import Count, Timing, probe
from ardiff.data.sources import find_tables
from ardiff.data.streams import ClipStream, Stream
from ardiff.data.video_tables import write_group
from ardiff.randomness import numpy_generator
from ardiff.resolution import Resolution

RESOLUTION = 128
CLIPS = ClipConfig(num_frames=16)
PARTS = ("decode", "probe", "filters", "storage", "ranges", "memory", "tables")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", *PARTS), default="all")
    parser.add_argument("--quick", action="store_true", help="fewer videos and repetitions")
    arguments = parser.parse_args()
    parts = PARTS if arguments.part == "all" else (arguments.part,)
    with tempfile.TemporaryDirectory() as folder:
        records = make_videos(Path(folder), 12 if arguments.quick else 40)
        repeats = 3 if arguments.quick else 5
        for part in parts:
            print(f"\n### {part}\n", flush=True)
            match part:
                case "decode":
                    measure_decode(records, repeats, 384 if arguments.quick else 1536)
                case "probe":
                    measure_probe(records, repeats)
                case "filters":
                    measure_filters(repeats)
                case "storage":
                    measure_storage(records, repeats)
                case "ranges":
                    measure_ranges(Path(folder), repeats)
                case "memory":
                    measure_memory(records, 96 if arguments.quick else 512)
                case "tables":
                    measure_tables(Path(folder), 50 if arguments.quick else 300)
    return 0


def make_videos(folder: Path, count: int) -> list[VideoRecord]:
    """Moving blocks of noise, 256 x 256, 96 frames, x264 with about one key frame per second."""
    records = []
    for number in range(count):
        path = folder / f"{number}.mp4"
        path.write_bytes(make_video(number, 96))
        info = probe(path.read_bytes())
        fields = ("h264", info.width, info.height, info.fps, info.num_frames, 0, "x", "train", "ok", "")
        times = info.timing
        records.append(VideoRecord(str(path), path.stat().st_size, *fields, pts_start=times.start, pts_step=times.step))
    return records


def make_video(
    seed: int,
    num_frames: int,
    crf: int = 23,
    size: int = 256,
    noise: bool = False,
    pix_fmt: str = "yuv420p",
    **options: str,
) -> bytes:
    generator, buffer = numpy_generator("benchmark", seed), io.BytesIO()
    texture = generator.integers(0, 255, (size // 8 + 40, size // 8 + 40, 3), dtype=np.uint8)
    texture = texture.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.width = stream.height = size
        stream.pix_fmt, stream.options = pix_fmt, {"crf": str(crf), "g": "24", "threads": "1", "preset": "ultrafast"}
        stream.options |= {name.replace("_", "-"): value for name, value in options.items()}
        for frame in range(num_frames):
            shift = frame * 2 % 300
            picture = texture[shift : shift + size, shift : shift + size]
            if noise:
                picture = generator.integers(0, 255, picture.shape, dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def plain_loop(records: list[VideoRecord], clips: int) -> float:
    """CPU seconds of one process that reads files and decodes and resizes clips with PyAV only."""
    started = time.process_time()
    scaler = av.video.reformatter.VideoReformatter()
    for number in range(clips):
        record = records[number % len(records)]
        start = int(numpy_generator("start", number).integers(record.num_frames - CLIPS.span + 1))
        with av.open(io.BytesIO(Path(record.uri).read_bytes()), "r") as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            first = round(record.pts_start + start * record.pts_step)
            container.seek(first, stream=stream, backward=True)
            pictures: list[np.ndarray] = []
            for frame in container.decode(stream):
                if frame.pts is not None and frame.pts >= first:
                    small = scaler.reformat(
                        frame, width=RESOLUTION, height=RESOLUTION, format="rgb24", interpolation="AREA", threads=1
                    )
                    pictures.append(small.to_ndarray())
                if len(pictures) == CLIPS.num_frames:
                    break
            np.stack(pictures)
    return time.process_time() - started


def other_loop(package: str, records: list[VideoRecord], clips: int) -> float:
    """The plain loop with decord, which resizes while it decodes, or torchcodec, which resizes separately.

    Raises ImportError if the package is not installed, or RuntimeError or OSError if it cannot be loaded.
    """
    module = importlib.import_module(package if package == "decord" else "torchcodec.decoders")
    started = time.process_time()
    for number in range(clips):
        record = records[number % len(records)]
        start = int(numpy_generator("start", number).integers(record.num_frames - CLIPS.span + 1))
        data, numbers = Path(record.uri).read_bytes(), list(range(start, start + CLIPS.num_frames))
        if package == "decord":
            reader = module.VideoReader(io.BytesIO(data), width=RESOLUTION, height=RESOLUTION, num_threads=1)
            reader.get_batch(numbers).asnumpy()
        else:
            frames = module.VideoDecoder(data, num_ffmpeg_threads=1).get_frames_at(numbers).data.float()
            torch.nn.functional.interpolate(frames, (RESOLUTION, RESOLUTION), mode="area").byte()
    return time.process_time() - started


@contextlib.contextmanager
def other_core_busy(records: list[VideoRecord]) -> Iterator[None]:
    """Runs a second plain loop next to the block, as Ray and the trainer run next to a loading task."""
    neighbour = multiprocessing.get_context("spawn").Process(target=plain_loop, args=(records, 1 << 30), daemon=True)
    neighbour.start()
    try:
        while sum(psutil.Process(neighbour.pid).cpu_times()[:2]) < 1.0:  # its imports are done
            time.sleep(0.1)
        yield
    finally:
        neighbour.kill()
        neighbour.join()


def measure_decode(records: list[VideoRecord], repeats: int, clips: int) -> None:
    from ray_jobs.runtime.cluster import ray_cluster

    frames = clips * CLIPS.num_frames
    stream = ClipStream(manifest_table(records), CLIPS, Resolution.square(RESOLUTION), seed=0)
    rows: list[dict[str, float]] = []
    plain_loop(records, 8)
    others = []
    for package in ("decord", "torchcodec"):
        try:
            other_loop(package, records, 1)
            others.append(package)
        except (ImportError, RuntimeError, OSError) as error:
            print(f"{package}: {str(error).splitlines()[0]}")
    with ray_cluster():
        feed(stream, 64 * stream.chunk_size)  # start workers, touch the pages of the object store
        for _ in range(repeats):
            rows.append({"alone": frames / plain_loop(records, clips), "stream": frames / stream_loop(stream, clips)})
            with other_core_busy(records):
                rows[-1]["contended"] = frames / plain_loop(records, clips)
            wall, cpu = feed(stream, clips)
            rows[-1] |= {"ray": frames / cpu, "wall": frames / wall}
            for package in others:
                rows[-1][package] = frames / other_loop(package, records, clips)
    median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    print("| path | frames per core-second | relative to one bare loop | relative to one of two bare loops |")
    print("|---|---|---|---|")
    paths = {
        "alone": "PyAV loop, one process, the other core idle",
        "contended": "PyAV loop, one of two processes on two cores",
        "stream": "`ClipStream.load`, one process, the other core idle",
        "ray": "Ray Data with a null trainer, which keeps both cores busy",
    }
    for name, title in {**paths, **{package: f"{package}, one process" for package in others}}.items():
        alone, contended = (statistics.median(row[name] / row[base] for row in rows) for base in ("alone", "contended"))
        print(f"| {title} | {median[name]:.0f} | **{alone:.2f}** | **{contended:.2f}** |")
    print(f"\n{clips} clips, {repeats} repetitions; with the null trainer {median['wall']:.0f} frames/s of wall time")


def stream_loop(stream: ClipStream, clips: int) -> float:
    started = time.process_time()
    for chunk in range(-(-clips // stream.chunk_size)):
        stream.load(chunk)
    return time.process_time() - started


def feed(stream: ClipStream, clips: int, pause: float = 0.0) -> tuple[float, float]:
    """Wall seconds and CPU seconds of the loading tasks, to load ``clips`` clips for a trainer that does nothing."""
    import ray

    from ardiff.train.config import TrainConfig
    from ray_jobs.training.batches import ray_batches

    config = TrainConfig(num_steps=clips // 16, batch_size=16, loading_tasks=1)
    meter = Meter(stream)
    started = time.perf_counter()
    for _ in ray_batches(cast(Stream, meter), 0, config, 0, None):
        time.sleep(pause)
    wall = time.perf_counter() - started
    spent = float(ray.get(meter.clock.read.remote()))
    return wall, spent


class Meter:
    """A stream that measures the CPU time of its loading processes, from the start of one load to the next."""

    def __init__(self, stream: ClipStream) -> None:
        import ray

        self.stream = stream
        self.clock: Any = ray.remote(Clock).options(num_cpus=0).remote()

    def __getattr__(self, name: str) -> object:
        if name == "stream":
            raise AttributeError(name)
        return getattr(self.stream, name)

    def load(self, chunk: int, rows: np.ndarray | None = None) -> object:
        # The total of the process, so that Ray's work on a block counts too, except for the last block.
        self.clock.record.remote(os.getpid(), sum(psutil.Process().cpu_times()[:2]), chunk)
        return self.stream.load(chunk, rows)


class Clock:
    def __init__(self) -> None:
        self.used: dict[int, list[float]] = {}

    def record(self, process: int, seconds: float, chunk: int) -> None:
        self.used.setdefault(process, []).append(seconds)

    def read(self) -> float:
        """CPU seconds between the first and the last load of every process, scaled to all of its loads."""
        spent = 0.0
        for seconds in self.used.values():
            if len(seconds) > 1:
                spent += (seconds[-1] - seconds[0]) * len(seconds) / (len(seconds) - 1)
        return spent


@contextlib.contextmanager
def s3_bucket() -> Iterator[str]:
    """A bucket of the S3 server of the tests."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from s3_server import S3Server, environment

    with S3Server() as server, environment(server.environment()):
        yield f"s3://{server.make_bucket()}"


def measure_storage(records: list[VideoRecord], repeats: int) -> None:
    with s3_bucket() as bucket:
        remote = []
        for record in records:
            uri = f"{bucket}/{Path(record.uri).name}"
            storage.write_bytes(uri, storage.read_bytes(record.uri))
            remote.append(uri)
        reading, loading = [], []
        tables = [
            manifest_table([replace(r, uri=u) for r, u in zip(records, uris, strict=True)])
            for uris in ([r.uri for r in records], remote)
        ]
        for _ in range(repeats):
            times = []
            for uris in ([r.uri for r in records], remote):
                started = time.perf_counter()
                for uri in uris:
                    storage.read_bytes(uri)
                times.append(time.perf_counter() - started)
            reading.append(times)
            times = []
            for table in tables:
                stream = ClipStream(table, CLIPS, Resolution.square(RESOLUTION), seed=0, chunk_size=len(records))
                started = time.perf_counter()
                stream.load(0)
                times.append(time.perf_counter() - started)
            loading.append(times)
    size = sum(r.size for r in records) / len(records) / 1024
    print("| one reader, sequential | local, ms per file | S3, ms per file | S3 / local |\n|---|---|---|---|")
    for name, pairs in ((f"reading files of {size:.0f} KiB", reading), ("clips: reading, decoding, resizing", loading)):
        local, s3 = (1e3 * statistics.median(pair[i] for pair in pairs) / len(records) for i in (0, 1))
        ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
        print(f"| {name} | {local:.2f} | {s3:.2f} | **{ratio:.2f}** |")


def measure_probe(records: list[VideoRecord], repeats: int) -> None:
    """Probes each file in both ways, one after the other."""
    files = [Path(record.uri).read_bytes() for record in records]
    seconds: dict[Count, list[float]] = {"decode": [], "packets": []}
    for _ in range(repeats):
        for count, times in seconds.items():
            started = time.process_time()
            for data in files:
                probe(data, count)
            times.append(time.process_time() - started)
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    decode, packets = (1e3 * statistics.median(times) / len(files) for times in seconds.values())
    print("| decode, CPU ms a file | packets, CPU ms a file | decode / packets |\n|---|---|---|")
    print(f"| {decode:.1f} | {packets:.2f} | **{ratio:.0f}** |")


def measure_filters(repeats: int) -> None:
    """Decodes and scales all frames of a video with a filter and without, in turns."""
    print("| filter | video | without, CPU ms a frame | with | with / without |\n|---|---|---|---|---|")
    bt2020 = "transfer=smpte2084:colorprim=bt2020:colormatrix=bt2020nc"
    kinds = {"deinterlace": ("yuv420p", "interlaced=1"), "tone_map": ("yuv420p10le", bt2020)}
    frames = list(range(48))
    for size in (256, 720):
        for name, (pix_fmt, x264) in kinds.items():
            data = make_video(0, len(frames), size=size, pix_fmt=pix_fmt, x264_params=x264)
            assert probe(data).warnings
            seconds: dict[tuple[str, ...], list[float]] = {(): [], (name,): []}
            for filters in seconds:
                decode_frames(data, frames[:2], Resolution.square(RESOLUTION), None, filters)  # fills tables
            for _ in range(repeats):
                for filters, times in seconds.items():
                    started = time.process_time()
                    decode_frames(data, frames, Resolution.square(RESOLUTION), None, filters)
                    times.append((time.process_time() - started) / len(frames))
            without, filtered = seconds.values()
            ratio = statistics.median(b / a for a, b in zip(without, filtered, strict=True))
            times_ms = " | ".join(f"{1e3 * statistics.median(times):.2f}" for times in (without, filtered))
            print(f"| `{name}` | {size} x {size}, {pix_fmt} | {times_ms} | **{ratio:.1f}** |", flush=True)


def measure_ranges(folder: Path, repeats: int) -> None:
    """Reads one clip in the middle of files of growing size, by ranges and whole."""
    print("| size, MiB | whole, ms | ranges, ms | requests | bytes read | whole / ranges |\n|---|---|---|---|---|---|")
    with s3_bucket() as bucket:
        for frames in (60, 200, 600, 1200):
            data = make_video(0, frames, crf=1, noise=True)
            timing: Timing = probe(data).timing
            storage.write_bytes(f"{bucket}/long.mp4", data)
            numbers = list(range(frames // 2, frames // 2 + 16))
            by_whole, by_ranges, requests, amount = [], [], 0, 0
            for _ in range(repeats):
                started = time.perf_counter()
                decode_frames(storage.read_bytes(f"{bucket}/long.mp4"), numbers, Resolution.square(RESOLUTION), timing)
                between = time.perf_counter()
                with counting() as read:
                    decode_frames(
                        storage.RangeReader(f"{bucket}/long.mp4", len(data)),
                        numbers,
                        Resolution.square(RESOLUTION),
                        timing,
                    )
                by_whole.append(between - started)
                by_ranges.append(time.perf_counter() - between)
                requests, amount = len(read), sum(read)
            a, b = statistics.median(by_whole), statistics.median(by_ranges)
            ratio = statistics.median(x / y for x, y in zip(by_whole, by_ranges, strict=True))
            print(
                f"| {len(data) / 2**20:.1f} | {1e3 * a:.0f} | {1e3 * b:.0f} | {requests} | {amount / len(data):.0%} | "
                f"**{ratio:.2f}** |",
                flush=True,
            )


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """The lengths of the ranges that the block reads."""
    lengths: list[int] = []
    original = storage.read_range

    def counted(uri: str, start: int, length: int) -> bytes:
        lengths.append(length)
        return original(uri, start, length)

    storage.read_range = counted
    try:
        yield lengths
    finally:
        storage.read_range = original


def measure_memory(records: list[VideoRecord], clips: int) -> None:
    """Peak memory of this process and its children, and bytes spilled, with a trainer slower than the data."""
    print("| videos | clips | peak, MiB | spilled |\n|---|---|---|---|")
    for times in (1, 10):
        command = [sys.executable, __file__, "--memory-of", str(times), str(clips)]
        names = "\n".join(f"{r.uri}\t{r.size}\t{r.num_frames}\t{r.pts_start}\t{r.pts_step}" for r in records)
        answer = subprocess.run(command, input=names, capture_output=True, text=True, check=True)
        print(answer.stdout.strip(), flush=True)


def measure_tables(folder: Path, videos: int) -> None:
    """Peak memory of a process that writes a row group with videos of 1 MiB as files, beyond that of its imports."""
    generator = numpy_generator("benchmark tables")
    content = [generator.bytes(1 << 20) for _ in range(videos)]
    pq.write_table(pa.table({"video": content}), folder / "videos.parquet", row_group_size=videos)
    command = [sys.executable, __file__, "--table-of", str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    print(f"| videos of 1 MiB | peak, MiB |\n|---|---|\n| {videos} | {answer.stdout.strip()} |")


def write_table(folder: str) -> None:
    def peak() -> int:
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) // 1024  # a mebibyte is 1024 kB there

    before = peak()
    [table] = find_tables(f"{folder}/videos.parquet", f"{folder}/out")
    write_group(table, 0, f"{folder}/out")
    print(peak() - before)


def memory_of(times: int, clips: int) -> None:
    import ray
    from ray._private.internal_api import memory_summary

    from ray_jobs.runtime.cluster import ray_cluster

    lines = [line.split("\t") for line in sys.stdin.read().splitlines()]
    records = [
        VideoRecord(
            uri,
            int(size),
            "h264",
            256,
            256,
            25.0,
            int(n),
            0,
            "x",
            "train",
            "ok",
            "",
            pts_start=int(a),
            pts_step=float(b),
        )
        for uri, size, n, a, b in lines
    ] * times
    stream = ClipStream(manifest_table(records), ClipConfig(num_frames=16), Resolution.square(256), seed=0)
    with ray_cluster():
        peak, done = [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.5):
                total = 0
                for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        total += process.memory_full_info().pss
                peak[0] = max(peak[0], total)

        watcher = threading.Thread(target=watch)
        watcher.start()
        feed(stream, clips * times, pause=0.05)
        done.set()
        watcher.join()
        address = ray.get_runtime_context().gcs_address
        summary: str = memory_summary(address=address, stats_only=True)  # type: ignore[no-untyped-call]
        spilled = next((line for line in summary.splitlines() if "Spilled" in line), "0")
    print(f"| {len(records)} | {clips * times} | {peak[0] / 2**20:.0f} | {spilled} |")


if __name__ == "__main__":
    if "--table-of" in sys.argv:
        write_table(sys.argv[2])
        raise SystemExit(0)
    if "--memory-of" in sys.argv:
        memory_of(*(int(number) for number in sys.argv[2:4]))
        raise SystemExit(0)
    raise SystemExit(main())
