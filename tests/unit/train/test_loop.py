"""The training loop: accumulation, exact resuming, and stopping before a bad update."""

import gzip
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ardiff.data.latents import LatentStatistics
from ardiff.diffusion.config import DiffusionConfig
from ardiff.errors import TrainingError
from ardiff.randomness import BatchGenerator, torch_generator
from ardiff.train.callbacks import TrainingCallback
from ardiff.train.checkpoint import TrainState, load_checkpoint, save_checkpoint
from ardiff.train.config import OptimizerConfig, TrainConfig
from ardiff.train.engines import factory
from ardiff.train.engines.base import ema_model
from ardiff.train.engines.torch_engine import TorchEngine
from ardiff.train.loop import train
from ardiff.train.tasks import AutoencoderTask, AutoencoderTaskConfig, Batch, DiTTask, DiTTaskConfig, Task
from ardiff.vae.config import DiscriminatorConfig

FRESH = TrainState(0, 0, "key")


class Regression(Task):
    """Least squares without randomness: the mean over a batch is the mean over its micro-batches."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model or nn.Linear(3, 1)

    def loss(self, batch: Batch, step: int, draws: BatchGenerator) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (self.model(batch["x"]) - batch["y"]).square().mean()
        return loss, {"half": loss / 2}

    def samples(self, model: nn.Module) -> Tensor | None:
        return torch.full((1, 1, 2, 2, 3), int(model.training), dtype=torch.uint8)


class Recorder(TrainingCallback):
    """Keeps the arguments of all hooks, and writes checkpoints if it has a folder."""

    def __init__(
        self, engine: TorchEngine | None = None, folder: Path | None = None, discriminator: TorchEngine | None = None
    ) -> None:
        self.engine, self.folder, self.discriminator = engine, folder, discriminator
        self.losses: dict[int, float] = {}
        self.logged: dict[int, dict[str, float]] = {}
        self.sheets: dict[int, Tensor] = {}
        self.states: list[TrainState] = []
        self.traces: list[bytes] = []

    def on_step_end(self, step: int, loss: float) -> None:
        self.losses[step] = loss

    def on_log(self, step: int, values: dict[str, float]) -> None:
        self.logged[step] = values

    def on_samples(self, step: int, videos: Tensor) -> None:
        self.sheets[step] = videos

    def on_trace(self, content: bytes) -> None:
        self.traces.append(content)

    def on_checkpoint(self, state: TrainState) -> None:
        self.states.append(state)
        if self.folder is not None and self.engine is not None:
            save_checkpoint(self.folder / str(state.step), self.engine, state, self.discriminator)


def settings(**changes: Any) -> TrainConfig:
    optimizer = OptimizerConfig(lr=1e-2, schedule="cosine", warmup_steps=2)
    return TrainConfig(**{"num_steps": 6, "batch_size": 4, "ema_decay": 0.9, "optimizer": optimizer, **changes})


def make_engine(task: Task, config: TrainConfig, model: nn.Module | None = None) -> TorchEngine:
    model, device = model or task.model, torch.device("cpu")
    return TorchEngine(model, config.optimizer, device, config.precision, config.max_grad_norm, config.ema_decay)


def memory_stream(kind: str, position: int, size: int) -> Iterator[Batch]:
    """Endless batches from sample ``position`` on; a sample depends on its number alone."""
    for first in itertools.count(position, size):
        generators = [torch_generator("sample", number) for number in range(first, first + size)]
        match kind:
            case "regression":
                x = torch.stack([torch.randn(3, generator=g) for g in generators])
                yield {"x": x, "y": x.sum(dim=1, keepdim=True)}
            case "vae":
                videos = [torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=g) for g in generators]
                yield {"video": torch.stack(videos)}
            case "dit":
                latents = torch.stack([torch.randn(4, 2, 4, generator=g) for g in generators])
                yield {"latents": latents, "label": torch.arange(first, first + size) % 3}


def run(task: Task, config: TrainConfig, kind: str = "regression", **arguments: Any) -> tuple[TorchEngine, Recorder]:
    engine = arguments.pop("engine", None) or make_engine(task, config)
    start = arguments.pop("start", FRESH)
    recorder = Recorder(engine, arguments.pop("folder", None), arguments.get("discriminator"))
    batches = arguments.pop("batches", None) or memory_stream(kind, start.samples, config.micro_batch_size)
    train(task, engine, batches, config, start, [recorder], **arguments)
    return engine, recorder


def regression() -> Regression:
    task = Regression()
    with torch.no_grad():
        task.model.weight.copy_(torch.tensor([[1.0, -1.0, 0.5]]))
        task.model.bias.fill_(0.3)
    return task


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_gives_the_same_update(parts: int) -> None:
    whole, reference = run(regression(), settings())
    cut, recorder = run(regression(), settings(gradient_accumulation=parts))
    for ours, theirs in zip(cut.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    for step in range(1, 7):
        assert recorder.losses[step] == pytest.approx(reference.losses[step], rel=1e-5)
    for name in ("loss", "grad_norm", "half", "lr_factor"):
        assert recorder.logged[6][name] == pytest.approx(reference.logged[6][name], rel=1e-5)
    assert recorder.states == reference.states == [TrainState(6, 24, "key")]


def make_task(kind: str, make_dit: Any, make_vae: Any, seed: int = 0) -> Task:
    if kind == "vae":
        return AutoencoderTask(make_vae(seed=seed), AutoencoderTaskConfig(temporal_from_step=4))
    statistics = LatentStatistics([[0.0] * 4] * 2, 1.0)
    return DiTTask(make_dit(seed=seed), DiTTaskConfig(class_dropout=0.3), DiffusionConfig(), statistics)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("kind", "parts"), [("dit", 1), ("dit", 2), ("vae", 1)])
def test_resuming_from_a_checkpoint_equals_an_uninterrupted_run(
    make_dit: Any, make_vae: Any, tmp_path: Path, kind: str, parts: int, optimizer: str
) -> None:
    optimizer_config = OptimizerConfig(name=optimizer, lr=1e-2, schedule="cosine", warmup_steps=2)  # type: ignore[arg-type]
    config = settings(optimizer=optimizer_config, gradient_accumulation=parts, checkpoint_every=3)
    unbroken, first = run(make_task(kind, make_dit, make_vae), config, kind, folder=tmp_path)
    task = make_task(kind, make_dit, make_vae, seed=9)  # what was in memory is lost
    engine = make_engine(task, config)
    state = load_checkpoint(tmp_path / "3", engine, "key")
    assert state == TrainState(3, 12, "key")
    _, second = run(task, config, kind, engine=engine, start=state)
    assert {s: loss for s, loss in first.losses.items() if s > 3} == second.losses
    for ours, theirs in zip(engine.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for name, average in unbroken.ema_weights().items():
        assert torch.equal(engine.ema_weights()[name], average)
    for ours, theirs in zip(engine.optimizers, unbroken.optimizers, strict=True):
        for index, values in theirs.state_dict()["state"].items():
            for name, value in values.items():
                assert torch.equal(torch.as_tensor(ours.state_dict()["state"][index][name]), torch.as_tensor(value))


def test_training_learns() -> None:
    optimizer_config = OptimizerConfig(lr=5e-2)
    _, recorder = run(regression(), settings(num_steps=150, optimizer=optimizer_config))
    assert recorder.losses[150] < 0.01 * recorder.losses[1]


def test_when_hooks_are_called() -> None:
    ticks = itertools.count(0.0, 2.0)
    config = settings(num_steps=7, log_every=3, checkpoint_every=2, sample_every=5)
    engine, recorder = run(regression(), config, clock=lambda: next(ticks))
    assert list(recorder.losses) == [1, 2, 3, 4, 5, 6, 7]
    assert list(recorder.logged) == [3, 6, 7]
    assert list(recorder.sheets) == [5, 7]
    assert [(s.step, s.samples, s.fingerprint) for s in recorder.states] == [
        (2, 8, "key"),
        (4, 16, "key"),
        (6, 24, "key"),
        (7, 28, "key"),
    ]
    assert [v["samples_per_second"] for v in recorder.logged.values()] == [6.0, 6.0, 2.0]
    assert not recorder.sheets[5].any()  # drawn by a model in evaluation mode
    assert engine.model.training


def test_without_sample_every_there_are_no_samples() -> None:
    assert not run(regression(), settings())[1].sheets


@pytest.mark.parametrize(("interval", "stops"), [(1, 3), (2, 4), (3, 3), (5, 5), (7, 6)])
def test_a_preempted_run_stops_after_a_checkpoint(interval: int, stops: int, tmp_path: Path) -> None:
    """The notice arrives in the third step, and the task can resume after every ``interval`` steps."""
    task, config = regression(), settings()
    task.checkpoint_interval = interval
    whole, _ = run(regression(), config)
    notices = itertools.chain([False, False], itertools.repeat(True))
    engine, recorder = run(task, config, folder=tmp_path, preempted=lambda: next(notices))
    assert [state.step for state in recorder.states] == [stops]
    start = load_checkpoint(tmp_path / str(stops), engine, "key")
    assert start.samples == stops * 4
    _, rest = run(task, config, engine=engine, start=start)
    assert sorted(recorder.losses.keys() | rest.losses.keys()) == list(range(1, 7))
    assert all(torch.equal(a, b) for a, b in zip(engine.model.parameters(), whole.model.parameters(), strict=True))


class Flags(TrainingCallback):
    """Has ``count`` flags and keeps their sums."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.totals: list[list[float]] = []
        self.ends = 0

    def flags(self) -> list[float]:
        return [10.0 * len(self.totals) + number for number in range(self.count)]

    def on_flags(self, totals: list[float]) -> None:
        self.totals.append(totals)

    def on_end(self) -> None:
        self.ends += 1


def test_flags_of_callbacks_are_summed_with_every_step() -> None:
    callbacks = [Flags(count) for count in (2, 0, 1)]
    config, task = settings(num_steps=2), regression()
    batches = memory_stream("regression", 0, config.batch_size)
    train(task, make_engine(task, config), batches, config, FRESH, callbacks)
    assert [callback.totals for callback in callbacks] == [[[0, 1], [10, 11]], [[], []], [[0], [10]]]
    assert [callback.ends for callback in callbacks] == [1, 1, 1]


def test_callbacks_end_with_a_preemption_and_before_an_error_of_the_checks() -> None:
    config, task, callback = settings(), regression(), Flags(1)
    engine = make_engine(task, config)
    batches = memory_stream("regression", 0, config.batch_size)
    train(task, engine, batches, config, FRESH, [callback], preempted=lambda: True)
    assert (callback.ends, len(callback.totals)) == (1, 1)
    bad = itertools.repeat({"x": torch.full((4, 3), math.nan), "y": torch.zeros(4, 1)})
    with pytest.raises(TrainingError, match="The loss is nan at step 0"):
        train(task, engine, bad, config, FRESH, [callback])
    assert (callback.ends, len(callback.totals)) == (2, 1)


def test_a_finished_run_does_not_change() -> None:
    task, config, done = regression(), settings(), TrainState(6, 24, "key")
    before = [p.detach().clone() for p in task.model.parameters()]
    recorder = Recorder()
    assert train(task, make_engine(task, config), iter(()), config, done, [recorder]) == done
    assert not recorder.states
    assert all(torch.equal(p, b) for p, b in zip(task.model.parameters(), before, strict=True))


def gan(make_vae: Any, from_step: int = 2, seed: int = 0, temporal_from_step: int = 0) -> AutoencoderTask:
    config = AutoencoderTaskConfig(
        adversarial_weight=0.5,
        adversarial_from_step=from_step,
        temporal_from_step=temporal_from_step,
        discriminator=DiscriminatorConfig(width=4, depth=1),
    )
    task = AutoencoderTask(make_vae(seed=seed), config)
    assert task.discriminator is not None
    generator = torch.Generator().manual_seed(seed)
    for parameter in task.discriminator.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    return task


def run_gan(task: AutoencoderTask, config: TrainConfig, **arguments: Any) -> tuple[list[Tensor], Recorder]:
    """The weights of both networks after training, and what was recorded."""
    discriminator = arguments.pop("discriminator", None) or make_engine(task, config, task.discriminator)
    engine, recorder = run(task, config, "vae", discriminator=discriminator, **arguments)
    return [*engine.model.parameters(), *discriminator.model.parameters()], recorder


@pytest.mark.parametrize("parts", [1, 2])
def test_adversarial_training_resumes_exactly(make_vae: Any, tmp_path: Path, parts: int) -> None:
    config = settings(gradient_accumulation=parts, checkpoint_every=3)
    unbroken, first = run_gan(gan(make_vae), config, folder=tmp_path)
    task = gan(make_vae, seed=9)
    engine, discriminator = make_engine(task, config), make_engine(task, config, task.discriminator)
    state = load_checkpoint(tmp_path / "3", engine, "key", discriminator)
    resumed, second = run_gan(task, config, engine=engine, discriminator=discriminator, start=state)
    assert {s: loss for s, loss in first.losses.items() if s > 3} == second.losses
    measured = ("samples_per_second", "data_wait_share", "tflops_per_worker", "memory_gib")
    same = {name for name in first.logged[6] if name not in measured}
    assert {n: first.logged[6][n] for n in same} == {n: second.logged[6][n] for n in same}
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(resumed, unbroken, strict=True))


def test_the_learning_rate_of_every_optimizer_is_logged(make_dit: Any, make_vae: Any) -> None:
    optimizer_config = OptimizerConfig(
        name="muon", lr=1e-3, muon_lr=1e-2, schedule="drop", drop_step=3, drop_factor=0.1
    )
    config = settings(optimizer=optimizer_config, log_every=1)
    _, recorder = run(make_task("dit", make_dit, make_vae), config, "dit")
    rates = [(logged["lr"], logged["muon_lr"]) for logged in recorder.logged.values()]
    assert rates == [pytest.approx((1e-3 * f, 1e-2 * f)) for f in [1.0] * 3 + [0.1] * 3]
    _, recorder = run_gan(gan(make_vae, from_step=4), settings(log_every=1))
    assert ["discriminator_lr" in recorder.logged[step] for step in range(1, 7)] == [False] * 4 + [True] * 2
    assert recorder.logged[6]["discriminator_lr"] == recorder.logged[6]["lr"] == 1e-2 * recorder.logged[6]["lr_factor"]


def test_the_discriminator_trains_from_its_first_step_on(make_vae: Any) -> None:
    task, config = gan(make_vae, from_step=4), settings(log_every=1)
    assert task.discriminator is not None
    seen = {0: [p.detach().clone() for p in task.discriminator.parameters()]}

    class Watch(Recorder):
        def on_step_end(self, step: int, loss: float) -> None:
            seen[step] = [p.detach().clone() for p in task.discriminator.parameters()]  # type: ignore[union-attr]
            super().on_step_end(step, loss)

    watch, discriminator = Watch(), make_engine(task, config, task.discriminator)
    batches = memory_stream("vae", 0, config.micro_batch_size)
    train(task, make_engine(task, config), batches, config, FRESH, [watch], discriminator=discriminator)
    changed = [any(not torch.equal(a, b) for a, b in zip(seen[s], seen[s + 1], strict=True)) for s in range(6)]
    assert changed == [False] * 4 + [True] * 2
    assert ["discriminator_loss" in watch.logged[s] for s in range(1, 7)] == [False] * 4 + [True] * 2
    assert watch.logged[6]["discriminator_grad_norm"] > 0


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_discriminator_that_is_not_finite_stops_before_its_update(make_vae: Any, what: str) -> None:
    task, config = gan(make_vae, from_step=0), settings(checkpoint_every=1)
    assert task.discriminator is not None
    honest, calls = task.discriminator_loss, 0

    def discriminator_loss() -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal calls
        loss, parts = honest()
        calls += 1
        zero = next(task.discriminator.parameters()).sum() * 0  # type: ignore[union-attr]
        return (loss if calls < 3 else loss + (zero.sqrt() if what == "gradient" else zero + math.nan)), parts

    task.discriminator_loss = discriminator_loss  # type: ignore[method-assign]
    expected, _ = run_gan(gan(make_vae, from_step=0), settings(num_steps=2, optimizer=OptimizerConfig()))
    config = settings(optimizer=OptimizerConfig())
    discriminator = make_engine(task, config, task.discriminator)
    with pytest.raises(TrainingError, match=f"discriminator's {what} is"):
        run(task, config, "vae", discriminator=discriminator)
    count = len(list(task.discriminator.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(task.discriminator.parameters(), expected[-count:], strict=True))


class Spoilt(Regression):
    """Returns a bad loss in the second micro-batch of the third step."""

    def __init__(self, what: str) -> None:
        super().__init__(regression().model)
        self.what, self.calls = what, 0

    def loss(self, batch: Batch, step: int, draws: BatchGenerator) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = super().loss(batch, step, draws)
        self.calls += 1
        if self.calls == 6:
            assert step == 2
            loss = (
                loss
                + {
                    "nan": torch.tensor(float("nan")),
                    "inf": torch.tensor(float("inf")),
                    "gradient": (self.model.weight.sum() * 0).sqrt(),  # 0, with a slope that is not finite
                }[self.what]
            )
        return loss, parts


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", "The loss is nan at step 2 on worker 0, samples 8 to 11"),
        ("inf", "The loss is inf at step 2 on worker 0"),
        ("gradient", "gradient is not finite at step 2, samples 8 to 11"),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_update(what: str, message: str) -> None:
    optimizer_config = OptimizerConfig(lr=1e-2)
    expected, _ = run(regression(), settings(gradient_accumulation=2, num_steps=2, optimizer=optimizer_config))
    config = settings(gradient_accumulation=2, checkpoint_every=1, optimizer=optimizer_config)
    task = Spoilt(what)
    engine = make_engine(task, config)
    recorder = Recorder()
    with pytest.raises(TrainingError, match=message):
        train(task, engine, memory_stream("regression", 0, 2), config, FRESH, [recorder])
    assert list(recorder.losses) == [1, 2]
    assert [s.step for s in recorder.states] == [1, 2]
    for ours, theirs in zip(engine.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for name, average in expected.ema_weights().items():
        assert torch.equal(engine.ema_weights()[name], average)


@pytest.mark.parametrize("parts", [1, 2])
def test_data_that_ends_is_an_error(parts: int) -> None:
    config = settings(gradient_accumulation=parts)
    batches = itertools.islice(memory_stream("regression", 0, config.micro_batch_size), 2 * parts + parts // 2)
    with pytest.raises(TrainingError, match="data ended at step 2 of 6"):
        run(regression(), config, batches=batches)


def test_noise_differs_between_steps_and_micro_batches() -> None:
    seen: list[float] = []

    class Spy(Regression):
        def loss(self, batch: Batch, step: int, draws: BatchGenerator) -> tuple[Tensor, dict[str, Tensor]]:
            seen.append(float(draws(len(batch["x"]), lambda g: torch.rand((), generator=g))[0]))
            return super().loss(batch, step, draws)

    run(Spy(), settings(gradient_accumulation=2, seed=1))
    assert len(set(seen)) == 12
    again = list(seen)
    seen.clear()
    run(Spy(), settings(gradient_accumulation=2, seed=1))
    assert seen == again
    seen.clear()
    run(Spy(), settings(gradient_accumulation=2, seed=2))
    assert not set(seen) & set(again)


def test_ema_model_is_a_copy_for_evaluation() -> None:
    engine, _ = run(regression(), settings())
    model = ema_model(engine)
    assert not model.training
    assert engine.model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, engine.ema_weights()[name])
        assert not torch.equal(parameter, dict(engine.model.named_parameters())[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(a.any() for a in engine.ema_weights().values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"gradient_accumulation": 0}, "at least 1"),
        ({"gradient_accumulation": 3}, "multiple of gradient_accumulation"),
        ({"cpu_threads": 0}, "at least 1"),
        ({"log_every": 0}, "log_every"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"sample_every": -1}, "sample_every"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.parametrize(("schedule", "bound"), [("constant", False), ("drop", False), ("cosine", True)])
def test_the_number_of_steps_matters_where_the_schedule_needs_it(schedule: str, bound: bool) -> None:
    optimizer_config = OptimizerConfig(schedule=schedule)  # type: ignore[arg-type]
    numbers = [settings(num_steps=steps, optimizer=optimizer_config).hyperparameters for steps in (6, 7)]
    assert (numbers[0] != numbers[1]) == bound


def test_hyperparameters_may_change_but_not_the_optimizer() -> None:
    plain, other = settings(), settings(optimizer=OptimizerConfig(lr=1e-5, beta1=0.8, schedule="drop"))
    assert plain.resume_key == other.resume_key
    assert plain.hyperparameters != other.hyperparameters
    assert plain.resume_key != settings(optimizer=OptimizerConfig(name="muon")).resume_key
    assert plain.resume_key != settings(seed=1).resume_key


def test_resuming_with_another_learning_rate(tmp_path: Path) -> None:
    """The result equals a schedule that drops the rate."""
    drop = OptimizerConfig(lr=1e-2, schedule="drop", drop_step=3, drop_factor=0.05)
    unbroken, _ = run(regression(), settings(optimizer=drop))
    first = settings(num_steps=3, optimizer=OptimizerConfig(lr=1e-2))
    _, recorder = run(regression(), first, folder=tmp_path)
    assert recorder.states[-1].hyperparameters == first.hyperparameters
    task, second = Regression(), settings(optimizer=OptimizerConfig(lr=5e-4))
    engine = make_engine(task, second)
    _, recorder = run(task, second, engine=engine, start=load_checkpoint(tmp_path / "3", engine, "key"))
    assert recorder.states[-1].hyperparameters == second.hyperparameters
    assert torch.allclose(engine.model.weight, unbroken.model.weight, rtol=0, atol=1e-7)


def test_micro_batches() -> None:
    assert settings(batch_size=12, gradient_accumulation=3).micro_batch_size == 4


@pytest.mark.parametrize(("batch", "num_workers", "accumulation"), [(8, 4, 1), (8, 3, 2), (32, 7, 1), (10, 5, 2)])
def test_micro_batches_of_all_ranks_make_up_the_batch(batch: int, num_workers: int, accumulation: int) -> None:
    elastic = {"min_workers": 1, "num_workers": num_workers, "gradient_accumulation": accumulation}
    config = settings(batch_size=batch, **elastic)
    for size in range(1, num_workers + 1):
        shares = [config.micro_batches(rank, size) for rank in range(size)]
        assert [place for share in shares for part in share for place in part] == list(range(batch))
        assert len({len(share) for share in shares}) == 1  # every worker takes part in every exchange
        assert max(len(part) for share in shares for part in share) <= config.micro_batch_size + 1
        assert min(len(part) for share in shares for part in share) >= 1


class Failing(Regression):
    """Raises at the second step."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def loss(self, batch: Batch, step: int, draws: BatchGenerator) -> tuple[Tensor, dict[str, Tensor]]:
        if step == 1:
            raise self.error
        return super().loss(batch, step, draws)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_lack_of_memory_names_worker_step_and_remedy(error: Exception) -> None:
    with pytest.raises(TrainingError, match=r"Worker 0 ran out of memory at step 1: .*gradient_accumulation.*stage"):
        run(Failing(error), settings())


def test_other_failures_name_worker_and_step() -> None:
    with pytest.raises(KeyError) as caught:
        run(Failing(KeyError("lost")), settings())
    assert caught.value.__notes__ == ["worker 0 at step 1"]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("on_samples", r"making the samples of step 3: set train\.sample_every=0"),
        ("on_checkpoint", r"storing the checkpoint of step 6: .*train\.deepspeed\.stage"),
    ],
)
def test_lack_of_memory_in_hooks_is_explained_too(part: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Recorder, part, fail)
    with pytest.raises(TrainingError, match=f"Worker 0 ran out of memory while {message}"):
        run(regression(), settings(sample_every=3))


class Jumping(Regression):
    """Its loss is 1, and another one from step 130 on."""

    def __init__(self, height: float, stage_starts: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.height, self.stage_starts = height, stage_starts

    def loss(self, batch: Batch, step: int, draws: BatchGenerator) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.weight.sum() * 0 + (self.height if step >= 130 else 1.0), {}


def test_a_spike_stops_before_its_update() -> None:
    config = settings(num_steps=140, max_loss_ratio=5.0)
    with pytest.raises(TrainingError, match=r"jumped to 10 at step 130, from a median of 1 .* samples 520 to 523"):
        run(Jumping(10.0), config)
    run(Jumping(10.0), settings(num_steps=140))
    with pytest.raises(TrainingError, match="jumped to 30 at step 130"):
        run(Jumping(30.0), settings(num_steps=140))
    run(Jumping(30.0), settings(num_steps=140, max_loss_ratio=0.0))


def test_the_start_of_a_stage_is_no_spike() -> None:
    run(Jumping(30.0, stage_starts=(130,)), settings(num_steps=140))


def test_the_spike_check_is_off_with_an_adaptive_weight() -> None:
    task = Jumping(30.0)
    task.discriminator = nn.Linear(1, 1)
    task.discriminator_loss = lambda: (task.discriminator.weight.sum(), {})  # type: ignore[method-assign, union-attr]
    run(task, settings(num_steps=140), discriminator=make_engine(task, settings(), task.discriminator))


class Negative(Regression):
    """Its loss is -1, as an adversarial one may be."""

    def loss(self, batch: Batch, step: int, draws: BatchGenerator) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.weight.sum() * 0 - 1.0, {}


def test_the_spike_check_is_off_if_the_median_is_not_positive() -> None:
    run(Negative(), settings(num_steps=110))


def test_losses_by_frame_and_timestep_are_means_of_their_kind(make_dit: Any, make_vae: Any) -> None:
    _, recorder = run(make_task("dit", make_dit, make_vae), settings(log_every=1, gradient_accumulation=2), "dit")
    for logged in recorder.logged.values():
        frames = [logged[f"loss_frame_{f:02d}"] for f in range(4)]
        assert sum(frames) / 4 == pytest.approx(logged["loss"], rel=1e-5)
        ranges = [value for name, value in logged.items() if name.startswith("loss_t_")]
        assert min(ranges) <= logged["loss"] <= max(ranges)


def test_logged_throughput() -> None:
    _, recorder = run(regression(), settings(log_every=1, peak_tflops=1e-6))
    logged = recorder.logged[6]
    assert 0 <= logged["data_wait_share"] <= 1
    assert logged["memory_gib"] > 0.01
    assert logged["tflops_per_worker"] == pytest.approx(1e-6 * logged["mfu"])
    forward = 2 * 4 * 3  # multiplications and additions of 4 samples, 3 inputs each
    seconds = 4 / logged["samples_per_second"]  # the inputs need no gradient, the weights do
    assert logged["tflops_per_worker"] == pytest.approx(2 * forward / seconds / 1e12)


def operations(task: Task, kind: str = "dit", **arguments: Any) -> list[int]:
    """The operations of each step, as they are logged."""
    ticks, config = itertools.count(), settings(log_every=1, **arguments.pop("settings", {}))
    engine = factory.make_engine(task.model, config, torch.device("cpu"))
    _, recorder = run(task, config, kind, engine=engine, clock=lambda: float(next(ticks)), **arguments)
    return [round(logged["tflops_per_worker"] * 1e12) for logged in recorder.logged.values()]


@pytest.mark.parametrize(
    "changes", [{}, {"linear": "onednn"}, {"activation_checkpointing": True}, {"gradient_accumulation": 2}]
)
def test_operations_are_six_for_every_weight_and_token_and_attention(make_dit: Any, changes: dict[str, Any]) -> None:
    width, depth, batch, frames, tokens, dim = 16, 2, 4, 4, 2, 4
    rows, entries = batch * frames * tokens, batch * frames
    inner = depth * (rows * 12 * width**2 + entries * 6 * width**2) + entries * 3 * width**2 + rows * width * dim
    attention = depth * 2 * batch * (frames * tokens) ** 2 * width
    first = rows * dim * width + entries * 256 * width  # latents and features of timesteps need no gradient
    task = make_task("dit", make_dit, None)
    assert operations(task, settings=changes) == [6 * (inner + attention) + 4 * first] * 6


def test_a_frozen_encoder_counts_with_its_forward_pass(make_dit: Any) -> None:
    task, encoder = make_task("dit", make_dit, None), nn.Linear(4, 4)
    assert isinstance(task, DiTTask)
    [plain] = set(operations(task))
    task.encode = torch.no_grad()(encoder)
    batches = ({"video": batch["latents"], "label": batch["label"]} for batch in memory_stream("dit", 0, 4))
    assert set(operations(task, batches=batches)) == {plain + 2 * (4 * 4 * 2) * 4 * 4}


@pytest.mark.parametrize("parts", [1, 2])
def test_operations_include_the_discriminator_and_the_temporal_decoder(make_vae: Any, parts: int) -> None:
    def of_steps(adversarial: int, temporal: int) -> list[int]:
        task, changes = gan(make_vae, adversarial, temporal_from_step=temporal), {"gradient_accumulation": parts}
        return operations(
            task, "vae", discriminator=make_engine(task, settings(**changes), task.discriminator), settings=changes
        )

    bare, both = set(of_steps(9, 9)), set(of_steps(0, 0))
    adversarial = set(of_steps(0, 9))
    assert [len(found) for found in (bare, adversarial, both)] == [1, 1, 1]
    assert max(bare) < max(adversarial) < max(both)
    assert of_steps(2, 4) == [*bare] * 2 + [*adversarial] * 2 + [*both] * 2


def test_fp16_skips_overflowing_steps_until_its_scale_fits(tmp_path: Path) -> None:
    config = settings(num_steps=30, precision="fp16", checkpoint_every=12)
    engine, _ = run(regression(), config, folder=tmp_path)
    exact, _ = run(regression(), settings(num_steps=30))
    assert torch.allclose(engine.model.weight, exact.model.weight, rtol=0, atol=0.05)
    assert not torch.allclose(engine.model.weight, regression().model.weight, rtol=0, atol=0.05)
    task = Regression()
    resumed = make_engine(task, config)
    state = load_checkpoint(tmp_path / "12", resumed, "key")
    assert resumed.scaler.get_scale() < 2**16  # what it starts with overflowed
    run(task, config, engine=resumed, start=state)
    assert torch.equal(resumed.model.weight, engine.model.weight)


def test_fp16_stops_after_many_overflows() -> None:
    class Steep(Regression):
        def loss(self, batch: Batch, step: int, draws: BatchGenerator) -> tuple[Tensor, dict[str, Tensor]]:
            return (self.model.weight.sum() * 0).sqrt(), {}

    with pytest.raises(TrainingError, match="gradient is not finite at step 50"):
        run(Steep(), settings(num_steps=60, precision="fp16"))


@pytest.mark.parametrize(("num_steps", "traced"), [(9, 0), (12, 2), (20, 3)])
def test_a_few_steps_are_traced_and_no_weight_changes(num_steps: int, traced: int) -> None:
    plain, silent = run(regression(), settings(num_steps=num_steps))
    engine, recorder = run(regression(), settings(num_steps=num_steps, profile=3))
    assert not silent.traces
    assert len(recorder.traces) == bool(traced)
    for content in recorder.traces:
        names = [event.get("name", "") for event in json.loads(gzip.decompress(content))["traceEvents"]]
        assert len([name for name in names if name == "aten::linear"]) == traced
    assert torch.equal(plain.model.weight, engine.model.weight)
