"""Cost of sampling: mode full against the cached modes window and rolling, in one run, as ratios.

    python benchmarks/sampling.py                # the tables of docs/performance.md, more than an hour on one core
    python benchmarks/sampling.py --quick        # fewer settings and repetitions
    python benchmarks/sampling.py --part packing # one of its tables

Each setting is timed in pairs, full then cached, and the median of the ratios is printed. Weights are random, since
they do not change the cost.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ardiff.diffusion.ad import ADSchedule, ad_schedule
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.guidance import guided_denoiser
from ardiff.diffusion.sampler import initial_noise, sample_full
from ardiff.diffusion.student import Student
from ardiff.dit import DiT, DiTConfig
from ardiff.resolution import Resolution
from ardiff.sampling.config import EngineConfig
from ardiff.sampling.cost import frame_evaluations
from ardiff.sampling.engine import SamplingEngine
from ardiff.sampling.params import SamplingMode, SamplingParams
from ardiff.sampling.request import EncodedPrompt, SampleRequest
from ardiff.vae import ARAutoencoder, AutoencoderConfig, DecoderCache

STEPS = 50
FULL_ITERATIONS = 40
"""Iterations of mode ``full`` that stand for all of them, which evaluate the same number of frames each."""
PARTS = ["short", "long", "few steps", "streaming", "packing", "switching"]
FEW_STEPS: dict[str, dict[str, Any]] = {
    "ddim, S = 50": {"num_inference_steps": 50, "ar_step": 25},
    "dpmpp_2m, S = 4": {"num_inference_steps": 4, "ar_step": 1, "solver": "dpmpp_2m"},
    "dpmpp_2m, S = 4, window_stride 4": {
        "num_inference_steps": 4,
        "ar_step": 1,
        "solver": "dpmpp_2m",
        "window_stride": 4,
    },
    "student, S = 1": {},
    "student, S = 1, window_stride 4": {"window_stride": 4},
}
TEXT_WIDTH = 384
"""Width of the token states of a small text encoder."""
DIFFUSION = DiffusionConfig()
STUDENT = DiffusionConfig(student=Student(timesteps=(999,)))


def build(width: int, depth: int, tokens: int, **changes: Any) -> DiT:
    """A model with random weights everywhere: with adaLN-zero, blocks would be the identity."""
    sizes = {"num_frames": 16, "num_tokens": tokens, "width": width, "depth": depth, "num_heads": 8}
    model = DiT(DiTConfig(**{**sizes, "num_classes": 4, "attention_window": 16, **changes}))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    return model.eval()


def make_request(frames: int, ar_step: int, mode: SamplingMode, seed: int = 0) -> SampleRequest:
    params = SamplingParams(
        class_label=0, seed=seed, num_frames=frames, ar_step=ar_step, num_inference_steps=STEPS, mode=mode
    )
    return SampleRequest(videos=(params,))


def run_full(model: DiT, frames: int, ar_step: int, iterations: int | None = None) -> tuple[float, int]:
    """Seconds and frame evaluations of mode ``full``, or of its first ``iterations``."""
    schedule = ad_schedule(frames, STEPS, ar_step, 16)
    assert schedule.window is not None
    spans = schedule.window[:iterations]
    schedule = ADSchedule(schedule.step_index[:iterations], schedule.update[:iterations], spans)
    noise = initial_noise([0], frames, model.config.num_tokens, model.config.token_dim)
    denoise = guided_denoiser(model, DIFFUSION, torch.zeros(1, dtype=torch.int64), 1.0)
    started = time.perf_counter()
    sample_full(denoise, noise, schedule, DIFFUSION)
    seconds = time.perf_counter() - started
    return seconds, int((spans[:, 1] - spans[:, 0]).sum())


def run_fast(model: DiT, frames: int, ar_step: int, mode: SamplingMode) -> tuple[float, int]:
    """Seconds and frame evaluations of a cached mode."""
    started = time.perf_counter()
    engine = SamplingEngine(model, DIFFUSION)
    engine.run(make_request(frames, ar_step, mode))
    return time.perf_counter() - started, engine.frame_evaluations


def peak_mib(arguments: list[str]) -> float:
    """Peak memory of sampling in a process of its own, without the memory of the loaded model, in MiB.

    The process runs the first iterations only; memory does not grow after them.
    """
    command = [sys.executable, __file__, *arguments]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(model: DiT, mode: SamplingMode, frames: int, ar_step: int, iterations: int = 150) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's peak to the memory resident now
    before = _resident("VmRSS")
    if mode == "full":
        run_full(model, frames, ar_step, iterations)
    else:
        engine = SamplingEngine(model, DIFFUSION)
        engine.submit(make_request(frames, ar_step, mode))
        for _ in range(iterations):
            engine.step()
    print((_resident("VmHWM") - before) / 1024)


def _resident(field: str) -> int:
    """A memory counter of this process in KiB, as the kernel reports it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def compare(model: DiT, frames: int, ar_step: int, modes: list[SamplingMode], repeats: int, sizes: list[str]) -> None:
    """Times mode ``full`` and each cached mode in turn, and prints a row per mode."""
    rounds = [
        (run_full(model, frames, ar_step), [run_fast(model, frames, ar_step, mode) for mode in modes])
        for _ in range(repeats)
    ]
    full_memory = peak_mib([*sizes, "--peak", "full", str(frames), str(ar_step)])
    for i, mode in enumerate(modes):
        ratio = statistics.median(full[0] / fast[i][0] for full, fast in rounds)
        full_time = statistics.median(full[0] for full, _ in rounds)
        fast_time = statistics.median(fast[i][0] for _, fast in rounds)
        full_count, fast_count = rounds[0][0][1], rounds[0][1][i][1]
        memory = peak_mib([*sizes, "--peak", mode, str(frames), str(ar_step)])
        print(
            f"| {frames} | {ar_step} | {mode} | {full_count} | {fast_count} | {full_count / fast_count:.2f} "
            f"| {full_time:.2f} | {fast_time:.2f} | **{ratio:.2f}** | {full_memory:.0f} | {memory:.0f} |",
            flush=True,
        )


def compare_all(
    model: DiT, frames: int, ar_steps: tuple[int, ...], modes: list[SamplingMode], repeats: int, sizes: list[str]
) -> None:
    """Prints the table of mode ``full`` against the cached modes."""
    print(
        "\n| F | ar_step | mode | evaluations full | fast | ratio | full s | fast s | time ratio "
        "| full MiB | fast MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for ar_step in ar_steps:
        compare(model, frames, ar_step, modes, repeats, sizes)


def few_step_figures(model: DiT, repeats: int) -> None:
    """Prints solvers of few steps and a student against mode ``full`` with 50 DDIM steps, ``ar_step`` 25, without
    guidance, which would cost all but the student a second branch. The time of mode ``full`` is that of its first
    ``FULL_ITERATIONS``, by evaluations."""
    print("\n| F | setting | evaluations | ratio | s | **time ratio** | first frame s |\n|---|---|---|---|---|---|---|")
    for frames in (16, 128):
        rounds = [
            (time_full(model, frames), [run_few_steps(model, frames, params) for params in FEW_STEPS.values()])
            for _ in range(repeats)
        ]
        full_time, full_count = statistics.median(full[0] for full, _ in rounds), rounds[0][0][1]
        print(f"| {frames} | full, ddim, S = 50 | {full_count} | 1 | {full_time:.2f} | 1 | |", flush=True)
        for i, name in enumerate(FEW_STEPS):
            seconds, first = (statistics.median(fast[i][n] for _, fast in rounds) for n in (0, 1))
            ratio, count = statistics.median(full[0] / fast[i][0] for full, fast in rounds), rounds[0][1][i][2]
            print(
                f"| {frames} | {name} | {count} | {full_count / count:.1f} | {seconds:.2f} | **{ratio:.1f}** | "
                f"{first:.3f} |",
                flush=True,
            )


def time_full(model: DiT, frames: int) -> tuple[float, int]:
    """Seconds and frame evaluations of mode ``full`` with ``ar_step`` 25, from its first iterations."""
    params = SamplingParams(num_frames=frames, num_inference_steps=STEPS, ar_step=25, mode="full")
    count = frame_evaluations(params, 16)
    seconds, measured = run_full(model, frames, 25, FULL_ITERATIONS)
    return seconds * count / measured, count


def run_few_steps(model: DiT, frames: int, changes: dict[str, Any]) -> tuple[float, float, int]:
    """Seconds to the last and to the first frame, and frame evaluations, of one of ``FEW_STEPS``."""
    params = SamplingParams(class_label=0, num_frames=frames, **changes)
    started, first = time.perf_counter(), None
    engine = SamplingEngine(model, DIFFUSION if "solver" in changes or "ar_step" in changes else STUDENT)
    engine.submit(SampleRequest(videos=(params,)))
    while engine.busy:
        if engine.step() and first is None:
            first = time.perf_counter() - started
    assert first is not None
    return time.perf_counter() - started, first, engine.frame_evaluations


def stream_figures(model: DiT, tokens: int) -> None:
    """Prints the time to the first frame and the steady frames per second, decoding included."""
    vae = ARAutoencoder(
        AutoencoderConfig(resolution=Resolution(64, 64), num_tokens=tokens, width=256, depth=6, num_heads=8)
    ).eval()
    print("\n| frames | ar_step | first frame, share of whole | frames/s steady | decoding, share of whole |")
    print("|---|---|---|---|---|")
    for frames, ar_step in ((16, 5), (128, 5), (128, 25)):
        engine, cache = SamplingEngine(model, DIFFUSION), DecoderCache()
        engine.submit(make_request(frames, ar_step, "window"))
        started, arrivals, decoding = time.perf_counter(), [], 0.0
        while engine.busy:
            for event in engine.step():
                before = time.perf_counter()
                with torch.no_grad():
                    vae.decode(event.latents, cache)
                decoding += time.perf_counter() - before
                arrivals.append(time.perf_counter() - started)
        half = len(arrivals) // 2
        steady = (len(arrivals) - 1 - half) / (arrivals[-1] - arrivals[half])
        print(
            f"| {frames} | {ar_step} | {arrivals[0] / arrivals[-1]:.3f} ({arrivals[0]:.2f} s) | {steady:.1f} | "
            f"{decoding / arrivals[-1]:.2f} |",
            flush=True,
        )


def packing_figures(model: DiT, repeats: int) -> None:
    """Prints the throughput of several requests at once, against one after another."""
    print("\n| requests at once | frames/s | ratio to one at a time |\n|---|---|---|")
    alone = 0.0
    for count in (1, 4, 16):
        rates = []
        videos = max(count, 4)
        for _ in range(repeats):
            engine = SamplingEngine(model, DIFFUSION, EngineConfig(max_requests=count))
            for seed in range(videos):
                engine.submit(make_request(16, 5, "window", seed))
            started = time.perf_counter()
            while engine.busy:
                engine.step()
            rates.append(videos * 16 / (time.perf_counter() - started))
        rate = statistics.median(rates)
        alone = alone or rate
        print(f"| {count} | {rate:.1f} | {rate / alone:.2f} |", flush=True)


def switching_figures(model: DiT, repeats: int) -> None:
    """Prints what another prompt costs in the middle of a video, against an iteration: its keys and values, which are
    computed once, and the iterations in which some frames have the old prompt and some the new one."""
    print("\n| tokens of a prompt | change ms | iteration ms | ratio | iteration with two prompts, ratio |")
    print("|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    for length in (12, 77):
        prompts = [EncodedPrompt.of(torch.randn(length, TEXT_WIDTH, generator=generator)) for _ in range(8 * repeats)]
        params = SamplingParams(prompt="0", num_frames=20 * len(prompts), ar_step=5, num_inference_steps=STEPS)
        engine = SamplingEngine(model, DIFFUSION)
        request_id = engine.submit(SampleRequest(videos=(params,), prompts={"0": prompts[0]}))
        changes, alone, mixed = [], [], []
        for number, prompt in enumerate(prompts[1:], 1):
            times = []
            for _ in range(90):  # frames with another prompt than the last one are final after 50 of them
                started = time.perf_counter()
                engine.step()
                times.append(time.perf_counter() - started)
            mixed += times[10:40]
            alone += times[60:]
            started = time.perf_counter()
            engine.change(request_id, {"prompt": str(number)}, {str(number): prompt})
            changes.append(time.perf_counter() - started)
        change, iteration = statistics.median(changes), statistics.median(alone)
        print(
            f"| {length} | {1000 * change:.2f} | {1000 * iteration:.2f} | **{change / iteration:.2f}** | "
            f"{statistics.median(mixed) / iteration:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=32, help="latent tokens per frame")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="pairs per setting")
    parser.add_argument("--part", choices=PARTS, help="this table only; default: all")
    parser.add_argument("--quick", action="store_true", help="one pair of each; without --part, F=16 only")
    parser.add_argument("--peak", nargs=3, metavar=("MODE", "FRAMES", "AR_STEP"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build(options.width, options.depth, options.tokens)
    if options.peak:
        print_peak(model, options.peak[0], int(options.peak[1]), int(options.peak[2]))
        return
    repeats = 1 if options.quick else options.repeats
    print(f"width {options.width}, depth {options.depth}, {options.tokens} tokens a frame, S={STEPS}, batch 1,")
    print(f"{options.threads} thread(s), torch {torch.__version__}; median of {repeats} pair(s)")
    run_fast(model, 4, 5, "window")  # warm-up
    sizes = ["--width", str(options.width), "--depth", str(options.depth), "--tokens", str(options.tokens)]
    for part in [options.part] if options.part else ["short"] if options.quick else PARTS:
        match part:
            case "short":
                compare_all(model, 16, (0, 5, 10, 25, 50), ["window"], repeats, sizes)
            case "long":
                compare_all(model, 128, (5, 25), ["window", "rolling"], repeats, sizes)
            case "few steps":
                few_step_figures(model, repeats)
            case "streaming":
                stream_figures(model, options.tokens)
            case "packing":
                packing_figures(model, repeats)
            case "switching":
                text = {"condition": "cross_attention", "condition_dim": TEXT_WIDTH}
                switching_figures(build(options.width, options.depth, options.tokens, **text), repeats)


if __name__ == "__main__":
    main()
