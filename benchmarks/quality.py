"""What the quickstart's models make, in one process without Ray: for experiments with the training recipe.

    python benchmarks/quality.py
    python benchmarks/quality.py --vae task.straightness_weight=0.06 --dit train.num_steps=1800
    python benchmarks/quality.py --vae-only
    python benchmarks/quality.py --keep runs/quality --part long        # trains only what the folder lacks
    python benchmarks/quality.py --text         # after `ardiff weights fetch text-minilm`
    python benchmarks/quality.py --shapes 32,32 36,64 64,36 --vae vae.patch_size=4      # one model for three shapes

Settings are those of configs/quickstart, with ``--text`` also of configs/quickstart_text, changed by ``--vae`` and
``--dit``. Prints the tables of docs/training.md, and with ``--part gaps`` or ``long`` those of docs/sampling.md. One
run takes about 20 minutes on a core. The order of the data differs from that of Ray Data, so the results are those of
another seed of `ardiff quickstart`.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ardiff.config import find_config, load_config
from ardiff.data.clips import read_clip
from ardiff.data.config import SyntheticConfig
from ardiff.data.encode import contact_sheet
from ardiff.data.latents import latent_sums, statistics_of
from ardiff.data.manifest import Split
from ardiff.data.synthetic import CLASSES
from ardiff.data.synthetic_captions import asks_for_held_out
from ardiff.data.synthetic_set import write_video
from ardiff.data.transforms import to_uint8, to_unit
from ardiff.diffusion.noise import q_sample
from ardiff.diffusion.prediction import predicted_x0
from ardiff.metrics.drift import colour_drift, content_colour
from ardiff.metrics.pairs.psnr import psnr
from ardiff.metrics.prompts import PROMPT_MEASURES, expected_class, prompt_measures
from ardiff.metrics.shapes import shape_measures
from ardiff.metrics.tracking import track
from ardiff.models import make_autoencoder, make_dit
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.resolution import Resolution
from ardiff.sampling.cost import frame_evaluations
from ardiff.sampling.params import SamplingParams, validate
from ardiff.text.encoder import TextEncoder
from ardiff.train.callbacks import TrainingCallback
from ardiff.train.checkpoint import TrainState
from ardiff.train.config import TrainConfig
from ardiff.train.engines.base import ema_model
from ardiff.train.engines.factory import make_engine
from ardiff.train.loop import train
from ardiff.train.tasks import AutoencoderTask, Batch, DiTTask, Task
from ardiff.vae import ARAutoencoder
from ray_jobs.training.config import TrainDiTConfig, TrainVAEConfig

FRAMES = 16
STEP = 8
"""Frames between the starts of two clips of a video, as in configs/quickstart/encode.yaml."""
SHOWN = ("frame identity", "neighbours alike", "steady area", "steady colour", "smooth motion")
AR_STEPS = (1, 5, 20)
GAPS = ((50, 2), (20, 1), (20, 2), (50, 5), (20, 3), (20, 4), (20, 5), (20, 20))
"""Sampling steps and ``ar_step``."""
LONG = [
    SamplingParams(
        num_inference_steps=20, ar_step=5, guidance_scale=1.5, num_frames=frames, sink_frames=sink, window_stride=k
    )
    for frames, sink, k in ((512, 0, 1), (512, 1, 1), (512, 0, 4), (512, 1, 4), (1024, 0, 1), (1024, 1, 1))
]
"""Parameters of long videos."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", nargs="*", default=[], help="key=value settings of the AR-VAE's training")
    parser.add_argument("--dit", nargs="*", default=[], help="key=value settings of the AR-DiT's training")
    parser.add_argument("--seed", type=int, default=0, help="seed of both trainings")
    parser.add_argument("--keep", type=Path, help="folder of the trained models; those that are there are used")
    parser.add_argument("--videos", type=int, default=128, help="generated videos per setting")
    parser.add_argument(
        "--shapes", nargs="+", type=Resolution.parse, default=[Resolution(32, 32)], help="height,width of each bucket"
    )
    parser.add_argument("--text", action="store_true", help="videos with captions, as in ardiff quickstart --text")
    parser.add_argument("--vae-only", action="store_true", help="train and measure the AR-VAE only")
    parser.add_argument("--part", choices=("recipe", "gaps", "long"), default="recipe", help="what to sample")
    parser.add_argument("--sheets", type=Path, help="folder for sheets of consecutive frames")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    buckets = [Videos.draw(arguments.text, shape, seed) for seed, shape in enumerate(arguments.shapes)]
    videos = buckets[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        vae = autoencoder(folder, buckets, arguments.vae, arguments.seed)
        for bucket in buckets:
            report_autoencoder(vae, bucket.test[:128, :FRAMES])
        if arguments.vae_only:
            return
        pipeline = trained_pipeline(folder, vae, buckets, arguments.dit, arguments.seed)
    if arguments.text:
        report_prompts(pipeline, [captions[0] for captions in videos.test_captions], arguments.videos, arguments.sheets)
    elif arguments.part == "gaps":
        report_gaps(pipeline, arguments.videos)
    elif arguments.part == "long":
        report_long(pipeline, min(arguments.videos, 16))
    else:
        for index, bucket in enumerate(buckets):
            report_next_frame(pipeline, *encode(vae, bucket.test, FRAMES), index)
            report_recipe(pipeline, arguments.videos, bucket, arguments.sheets)


# --------------------------------------------------------------------------------------------------- data and training


def files(name: str, text: bool) -> list[Path]:
    """The quickstart's configuration of a stage."""
    return [find_config(f"{folder}/{name}") for folder in ("quickstart", *(("quickstart_text",) if text else ()))]


@dataclass(frozen=True, eq=False)
class Videos:
    """The synthetic set, through H.264 as in the quickstart: videos uint8 ``(V, 48, H, W, 3)`` and their captions."""

    train: Tensor
    train_captions: list[tuple[str, ...]]
    test: Tensor
    test_captions: list[tuple[str, ...]]

    @property
    def has_text(self) -> bool:
        return bool(self.train_captions[0])

    @property
    def shape(self) -> Resolution:
        """Height and width of the frames."""
        return Resolution(*self.train.shape[2:4])

    @staticmethod
    def draw(captions: bool, shape: Resolution, seed: int) -> "Videos":
        """1024 videos for training and 256 for tests."""
        sizes = {"num_train": 1024, "num_test": 256, "num_frames": 48, "num_long": 0}
        config = SyntheticConfig(**sizes, resolution=shape, captions=captions, seed=seed)
        parts: list[Any] = []
        for split, count in (("train", config.num_train), ("test", config.num_test)):
            with tempfile.TemporaryDirectory() as folder:
                records = [write_video(config, folder, index, cast(Split, split)) for index in range(count)]
                frames = np.stack([read_clip(r, 0, 48, 1, config.resolution) for r in records])
            parts += [torch.from_numpy(frames), [record.captions for record in records]]
        return Videos(*parts)


def autoencoder(folder: Path, buckets: Sequence[Videos], settings: list[str], seed: int) -> ARAutoencoder:
    """The AR-VAE of the folder, trained if there is none."""
    first, *others = ([*videos.shape] for videos in buckets)
    settings = [f"vae.resolution={first}", f"vae.buckets={others}", *settings, f"train.seed={seed}"]
    config = load_config(TrainVAEConfig, files("train_vae.yaml", buckets[0].has_text), settings)
    torch.manual_seed(seed)
    vae, file = make_autoencoder(config.vae), folder / "vae.safetensors"
    if file.exists():
        vae.load_state_dict(load_file(file))
        vae.eval().requires_grad_(False)
        return vae
    batches = clip_batches([videos.train for videos in buckets], config.clips.num_frames, config.train, seed + 1)
    trained: ARAutoencoder = run(AutoencoderTask(vae, config.task), config.train, batches)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(trained.state_dict(), file)
    return trained


def trained_pipeline(
    folder: Path, vae: ARAutoencoder, buckets: Sequence[Videos], settings: list[str], seed: int
) -> ARDiffusionPipeline:
    """The pipeline of the folder. If there is none, an AR-DiT is trained on the AR-VAE's latents."""
    if (folder / "pipeline").exists():
        return ARDiffusionPipeline.from_pretrained(str(folder / "pipeline"))
    videos, encoded = buckets[0], [encode(vae, bucket.train, STEP) for bucket in buckets]
    clips, labels = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    shapes = torch.arange(len(buckets)).repeat_interleave(len(clips) // len(buckets))
    statistics = statistics_of([latent_sums(clips.numpy())])
    sizes = [f"dit.num_tokens={clips.shape[2]}", f"dit.token_dim={clips.shape[3]}", f"dit.num_shapes={len(buckets)}"]
    sizes += ["dit.num_classes=0"] if videos.has_text else []
    settings = [*sizes, *settings, f"train.seed={seed}"]
    config = load_config(TrainDiTConfig, files("train_dit.yaml", videos.has_text), settings)
    torch.manual_seed(seed)
    task = DiTTask(make_dit(config.dit), config.task, config.diffusion, statistics)
    batches, encoder = latent_batches(clips, labels, shapes, config.train, seed + 11), None
    if videos.has_text:
        encoder = TextEncoder.load("text-minilm")
        batches = with_texts(batches, encoder, videos.train_captions, len(clips) // len(videos.train), seed)
    dit = run(task, config.train, batches)
    names = () if videos.has_text else CLASSES
    pipeline = ARDiffusionPipeline(vae, dit, config.diffusion, statistics, names, text_encoder=encoder)
    pipeline.save_pretrained(str(folder / "pipeline"))
    return pipeline


def run(task: Task, config: TrainConfig, batches: Iterator[Batch]) -> Any:
    """Trains the task's model. Returns its moving average."""
    engine = make_engine(task.model, config, torch.device("cpu"))
    start = time.process_time()
    train(task, engine, batches, config, TrainState(0, 0, ""), [Progress(config.num_steps)])
    print(f"{config.num_steps} steps, {time.process_time() - start:.0f} s CPU", flush=True)
    model = ema_model(engine)
    assert model is not None
    return model.eval().requires_grad_(False)


class Progress(TrainingCallback):
    """Prints the logged losses a few times."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def on_log(self, step: int, values: dict[str, float]) -> None:
        if step % 300 == 0 or step == self.num_steps:
            shown = {k: v for k, v in values.items() if k in ("loss", "reconstruction", "kl", "curvature")}
            print(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in shown.items()), flush=True)


def batches_of(count: int, size: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless random batches of the numbers below ``count``."""
    while True:
        order = generator.permutation(count)
        yield from (order[k : k + size] for k in range(0, count - size + 1, size))


def clip_batches(buckets: Sequence[Tensor], num_frames: int, config: TrainConfig, seed: int) -> Iterator[Batch]:
    """Batches of the AR-VAE: one clip of each video, all of one bucket, drawn at random."""
    generator = np.random.default_rng(seed)
    orders = [batches_of(len(videos), config.batch_size, generator) for videos in buckets]
    while True:
        bucket = int(generator.integers(len(buckets))) if len(buckets) > 1 else 0
        videos, chosen = buckets[bucket], next(orders[bucket])
        starts = generator.integers(0, videos.shape[1] - num_frames + 1, len(chosen))
        clips = torch.stack([videos[i, s : s + num_frames] for i, s in zip(chosen, starts, strict=True)])
        yield {"video": clips, "shape": torch.full((len(clips),), bucket)}


def latent_batches(clips: Tensor, labels: Tensor, shapes: Tensor, config: TrainConfig, seed: int) -> Iterator[Batch]:
    """Batches of the AR-DiT, with the numbers of their clips as ``index``."""
    for chosen in batches_of(len(clips), config.batch_size, np.random.default_rng(seed)):
        index = torch.from_numpy(chosen)
        yield {"latents": clips[index], "label": labels[index], "shape": shapes[index], "index": index}


def with_texts(
    batches: Iterator[Batch], encoder: TextEncoder, captions: list[tuple[str, ...]], clips: int, seed: int
) -> Iterator[Batch]:
    """The batches with a random caption of each clip's video, which has ``clips`` clips."""
    distinct = sorted({caption for own in captions for caption in own})
    states, mask = encoder(distinct)
    number = {caption: index for index, caption in enumerate(distinct)}
    of_videos = torch.tensor([[number[caption] for caption in own] for own in captions])  # (V, captions)
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        chosen = torch.randint(of_videos.shape[1], batch["index"].shape, generator=generator)
        texts = of_videos[batch["index"] // clips, chosen]  # (B,)
        yield {**batch, "text": states[texts], "text_mask": mask[texts]}


@torch.no_grad()
def encode(vae: Any, videos: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """The latents of all clips ``step`` frames apart, ``(n, 16, L, D)``, and their classes ``(n,)``."""
    latents = torch.cat([vae.encode(to_unit(part)).mean for part in videos.split(32)])  # (V, 48, L, D)
    starts = range(0, videos.shape[1] - FRAMES + 1, step)
    clips = torch.stack([latents[:, s : s + FRAMES] for s in starts], dim=1).flatten(0, 1)
    return clips, (torch.arange(len(videos)) % len(CLASSES)).repeat_interleave(len(starts))


# ------------------------------------------------------------------------------------------------------------- reports


def measures(videos: np.ndarray) -> dict[str, float]:
    """The mean of each measure of shapes over videos whose classes come in turn."""
    rows = [shape_measures(track(video), index % len(CLASSES)) for index, video in enumerate(videos)]
    return {name: float(np.mean([row[name] for row in rows])) for name in SHOWN}


def row(name: str, cells: Sequence[str]) -> None:
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def header(first: str, columns: Sequence[str]) -> None:
    row(first, columns)
    row("---", ["---"] * len(columns))


@torch.no_grad()
def report_autoencoder(vae: Any, clips: Tensor) -> None:
    """PSNR, how straight latents are over their variance, and what reconstructions show."""
    latents = vae.encode(to_unit(clips)).mean
    decoded = to_uint8(vae.decode_long(latents, shape=Resolution(*clips.shape[2:4]))).numpy()
    decibels = np.mean([psnr(a, b) for a, b in zip(clips.numpy(), decoded, strict=True)])
    variance = float(latents.var())
    line, copy = (float(latents.diff(n=n, dim=1).square().mean()) / variance for n in (2, 1))
    header("latents", ["PSNR", "straight line", "copy", *SHOWN])
    cells = [f"{value:.3f}" for value in (line, copy, *measures(decoded).values())]
    row(f"{latents.shape[2]} x {latents.shape[3]}", [f"{decibels:.1f} dB", *cells])


@torch.no_grad()
def report_next_frame(pipeline: ARDiffusionPipeline, clips: Tensor, labels: Tensor, shape: int) -> None:
    """The error of frame 8 after eight clean frames by its timestep, and of copying or extending the frames before, in
    frames of the shape of this index."""
    diffusion, x0 = pipeline.diffusion, pipeline.statistics.normalise(clips)
    abar = diffusion.alphas_cumprod()
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    header("t of frame 8", ["squared error of x0"])
    for t in (1, 20, 50, 200, 400, 600, 800, 999):
        timesteps = torch.zeros(x0.shape[:2], dtype=torch.long)
        timesteps[:, 8:] = t
        noisy = q_sample(x0, eps, timesteps, abar)
        noisy[:, :8] = x0[:, :8]
        output = pipeline.dit(noisy, timesteps, pipeline.dit.label(labels, shape))
        predicted = predicted_x0(diffusion.prediction, output, noisy, timesteps, abar)
        row(str(t), [f"{float((predicted - x0)[:, 8].square().mean()):.4f}"])
    row("copy", [f"{float((x0[:, 7] - x0[:, 8]).square().mean()):.4f}"])
    row("straight line", [f"{float((2 * x0[:, 7] - x0[:, 6] - x0[:, 8]).square().mean()):.4f}"])


def generate(pipeline: ARDiffusionPipeline, count: int, seed: int = 0, **params: Any) -> np.ndarray:
    """Videos of the classes in turn, uint8 ``(count, F, H, W, 3)``."""
    parts = []
    for first in range(0, count, 32):
        numbers = range(first, min(first + 32, count))
        labels, seeds = [n % len(CLASSES) for n in numbers], [1000 * seed + n for n in numbers]
        given = {"condition": c[first : numbers.stop]} if (c := params.get("condition")) is not None else {}
        parts.append(pipeline(class_label=labels, seed=seeds, **{"guidance_scale": 1.5, **params, **given}).frames)
    return torch.cat(parts).numpy()


def report_recipe(pipeline: ARDiffusionPipeline, count: int, bucket: Videos, sheets: Path | None) -> None:
    """What videos of a bucket's shape show by ``ar_step``, continued from real frames, and at the ends of long ones."""
    size = bucket.shape.size
    header(f"videos of {size}", SHOWN)
    for ar_step in AR_STEPS:
        videos = generate(pipeline, count, num_inference_steps=20, ar_step=ar_step, size=size)
        row(f"ar_step {ar_step}", [f"{value:.3f}" for value in measures(videos).values()])
        if sheets is not None:
            sheets.mkdir(parents=True, exist_ok=True)
            (sheets / f"{size}-ar-step-{ar_step}.png").write_bytes(contact_sheet(videos[:8], [*CLASSES, *CLASSES]))
    given = bucket.test[: min(count, 32), :8]
    videos = generate(pipeline, len(given), num_inference_steps=20, ar_step=20, condition=given, size=size)
    row("8 frames after 8 real ones", [f"{value:.3f}" for value in measures(videos[:, 8:]).values()])
    videos = generate(pipeline, min(count, 16), num_inference_steps=20, ar_step=5, num_frames=128, size=size)
    for name, part in (("first", videos[:, :FRAMES]), ("last", videos[:, -FRAMES:])):
        row(f"{name} 16 of 128 frames", [f"{value:.3f}" for value in measures(part).values()])


def report_prompts(pipeline: ARDiffusionPipeline, prompts: list[str], count: int, sheets: Path | None) -> None:
    """How well videos follow prompts, by ``ar_step``: of shapes in colours that training has seen, and of others."""
    groups = {
        "seen": [prompt for prompt in prompts if not asks_for_held_out(prompt)][:count],
        "held out": [prompt for prompt in prompts if asks_for_held_out(prompt)][:count],
    }
    header("prompts", [*PROMPT_MEASURES, *SHOWN])
    for ar_step in (0, 5, 20):
        for name, group in groups.items():
            params = SamplingParams(num_inference_steps=20, guidance_scale=1.5, ar_step=ar_step)
            videos = pipeline(params, prompt=group, seed=range(len(group))).frames
            others = [group[(7 * index + 3) % len(group)] for index in range(len(group))]
            rows = [
                prompt_measures(tracking, prompt, other) | shape_measures(tracking, expected_class(prompt))
                for tracking, prompt, other in zip(map(track, videos.numpy()), group, others, strict=True)
            ]
            means = {measure: float(np.mean([row[measure] for row in rows])) for measure in rows[0]}
            row(f"{name}, ar_step {ar_step}", [f"{means[measure]:.3f}" for measure in (*PROMPT_MEASURES, *SHOWN)])
            if sheets is not None:
                sheets.mkdir(parents=True, exist_ok=True)
                (sheets / f"{name}-{ar_step}.png").write_bytes(contact_sheet(videos[:8].numpy(), group[:8]))


def report_gaps(pipeline: ARDiffusionPipeline, count: int) -> None:
    """What videos show by the share that ``ar_step`` has in the sampling steps."""
    header("steps, ar_step, share", SHOWN)
    for steps, ar_step in GAPS:
        values = measures(generate(pipeline, count, num_inference_steps=steps, ar_step=ar_step)).values()
        row(f"{steps}, {ar_step}, {ar_step / steps:.2f}", [f"{value:.3f}" for value in values])


def report_long(pipeline: ARDiffusionPipeline, count: int) -> None:
    """How the last quarter of long videos compares with their beginning, with 20 steps and ``ar_step`` 5."""
    measured = ("frame identity", "neighbours alike", "smooth motion")
    header("num_frames, sink_frames, window_stride", ["evaluations", "CPU s", "colour drift", *measured])
    for params in LONG:
        start = time.process_time()
        videos = generate(pipeline, count, **params.changed())
        cells = [str(frame_evaluations(validate(params, pipeline.info), FRAMES)), f"{time.process_time() - start:.0f}"]
        clips = videos.reshape(count, -1, FRAMES, *videos.shape[2:])  # (V, S, 16, H, W, 3)
        colours = np.stack([[content_colour(clip) for clip in video] for video in clips], axis=1)  # (S, V, 3)
        quarter = len(colours) // 4
        cells.append(f"{np.sqrt(np.mean(np.square(colour_drift(colours)[-quarter:]))):.1f}")
        parts = [[measures(clips[:, s]) for s in segments] for segments in (range(quarter), range(-quarter, 0))]
        for name in measured:
            cells.append(" / ".join(f"{np.mean([values[name] for values in part]):.3f}" for part in parts))
        row(f"{params.num_frames}, {params.sink_frames}, {params.window_stride}", cells)


if __name__ == "__main__":
    main()
