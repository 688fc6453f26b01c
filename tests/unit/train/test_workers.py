"""Several workers do what one does: on the same global batch the same losses and weights, whatever the engine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_workers

from ardiff.data.latents import LatentStatistics
from ardiff.diffusion.process import DiffusionConfig
from ardiff.dit import DiT, DiTConfig
from ardiff.randomness import torch_generator
from ardiff.train import workers
from ardiff.train.checkpoint import Shards, TrainState, load_checkpoint, save_checkpoint
from ardiff.train.loop import TrainConfig, make_engine, train
from ardiff.train.tasks import DiTTask, DiTTaskConfig

CPU = torch.device("cpu")
# An odd width of the class embedding and three classes: tensors that two workers cannot share out evenly.
SIZES = {"num_frames": 4, "num_tokens": 3, "token_dim": 3, "width": 20, "depth": 2, "num_heads": 2, "num_classes": 4}
STEPS = 6


def settings(**changes: Any) -> TrainConfig:
    optimizer = {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.01}
    tree = {"num_steps": STEPS, "batch_size": 8, "ema_decay": 0.9, "checkpoint_every": 3, "log_every": 1}
    from ardiff.config import build

    return build(TrainConfig, {**tree, "optimizer": optimizer, **changes})


class Recorder:
    """Keeps losses, and checkpoints in ``folder``."""

    def __init__(self, folder: Path, engine: Any) -> None:
        self.folder, self.engine, self.values = folder, engine, dict[int, dict[str, float]]()

    def progress(self, step: int, loss: float) -> None: ...

    def samples(self, step: int, videos: torch.Tensor) -> None: ...

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.values[step] = values

    def checkpoint(self, state: TrainState) -> None:
        save_checkpoint(self.folder / str(state.step), self.engine, state)


def samples(first: int, count: int) -> dict[str, torch.Tensor]:
    generators = [torch_generator("sample", number) for number in range(first, first + count)]
    latents = torch.stack([torch.randn(4, 3, 3, generator=g) for g in generators])
    return {"latents": latents, "label": torch.arange(first, first + count) % 4}


def work(changes: dict[str, Any], folder: Path, start: Path | None = None) -> None:
    """One worker's part of a run; the first one writes the logged values."""
    config = settings(num_workers=workers.size(), **changes)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = DiT(DiTConfig(**SIZES))
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    statistics = LatentStatistics([[0.0] * 3] * 3, 1.0)
    task = DiTTask(model, DiTTaskConfig(class_dropout=0.3), DiffusionConfig(), statistics)
    engine = make_engine(model, config, CPU)
    state = load_checkpoint(start, engine, "key") if start else TrainState(0, 0, "key")

    def batches() -> Any:
        for step in range(state.step, STEPS):
            for part in range(config.gradient_accumulation):
                first = step * 8 + workers.rank() * config.share + part * config.micro_batch_size
                yield samples(first, config.micro_batch_size)

    recorder = Recorder(folder, engine)
    train(task, engine, batches(), config, state, recorder)
    if workers.rank() == 0:
        (folder / "values.json").write_text(json.dumps(recorder.values))


def weights(folder: Path, part: str = "model") -> dict[str, torch.Tensor]:
    shards = Shards(folder)
    return {name: shards.read(part, name) for name in sorted(shards.names(part))}


def values(folder: Path) -> dict[str, dict[str, float]]:
    return json.loads((folder / "values.json").read_text())


def assert_close(ours: Path, theirs: Path, atol: float, parts: tuple[str, ...] = ("model", "ema", "optimizer")) -> None:
    for part in parts:
        one, other = weights(ours, part), weights(theirs, part)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            # The bias of the keys has no gradient but rounding errors, which Adam scales up to its learning rate.
            limit = 1e-2 if name.endswith("qkv.bias") else atol
            assert torch.allclose(tensor, other[name], rtol=0, atol=limit), f"{part} {name}"


def assert_same(ours: Path, theirs: Path) -> None:
    for part in ("model", "ema", "optimizer"):
        one, other = weights(ours, part), weights(theirs, part)
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one worker with the plain engine."""
    folder = tmp_path_factory.mktemp("alone")
    work({}, folder)
    return folder


def zero(stage: int, **changes: Any) -> dict[str, Any]:
    return {"engine": "deepspeed", "deepspeed": {"stage": stage, **changes}}


def test_two_workers_equal_one(alone: Path, tmp_path: Path) -> None:
    run_workers(2, work, {"gradient_accumulation": 2}, tmp_path)
    assert_close(tmp_path / "6", alone / "6", 5e-6)
    ours, theirs = values(tmp_path), values(alone)
    for step in theirs:
        for name in ("loss", "grad_norm", "mean_timestep"):
            assert ours[step][name] == pytest.approx(theirs[step][name], rel=1e-5)
    assert len(list((tmp_path / "6").glob("model-*"))) == 2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_equals_plain_adamw(alone: Path, tmp_path: Path, stage: int) -> None:
    run_workers(2, work, {"gradient_accumulation": 2, **zero(stage)}, tmp_path)
    assert_close(tmp_path / "6", alone / "6", 5e-6)
    ours, theirs = values(tmp_path), values(alone)
    for step in theirs:
        for name in ("loss", "grad_norm"):
            assert ours[step][name] == pytest.approx(theirs[step][name], rel=1e-5)
