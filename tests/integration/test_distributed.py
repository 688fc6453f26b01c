"""Several ranks equal one: the same losses and weights on the same batch, with every engine."""

import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_workers
from safetensors.torch import load_file, save_file

from ardiff import distributed
from ardiff.config import build
from ardiff.data.latents import LatentStatistics
from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiT, DiTConfig
from ardiff.dit.config import LoRAConfig
from ardiff.dit.lora import add_lora
from ardiff.errors import CheckpointError, ConfigError
from ardiff.randomness import BatchGenerator, torch_generator
from ardiff.train.callbacks import TrainingCallback
from ardiff.train.checkpoint import TrainState, load_checkpoint, local_shards, save_checkpoint, write_shards
from ardiff.train.config import TrainConfig
from ardiff.train.engines.base import ema_model
from ardiff.train.engines.factory import make_discriminator_engine, make_engine
from ardiff.train.loop import train
from ardiff.train.meter import Meter
from ardiff.train.shards import GROUPS, Shard, ShardReader
from ardiff.train.tasks import (
    AutoencoderTask,
    AutoencoderTaskConfig,
    DistillTask,
    DistillTaskConfig,
    DiTTask,
    DiTTaskConfig,
)
from ardiff.train.tasks.distill import diffusion_of_student
from ardiff.vae import ARAutoencoder, AutoencoderConfig
from ardiff.vae.config import DiscriminatorConfig

CPU = torch.device("cpu")
# An odd width of the class embedding and three classes: tensors that two workers cannot share out evenly.
SIZES = {"num_frames": 4, "num_tokens": 3, "token_dim": 3, "width": 20, "depth": 2, "num_heads": 2, "num_classes": 4}
STEPS = 6


def settings(**changes: Any) -> TrainConfig:
    optimizer = {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.01}
    tree = {"num_steps": STEPS, "batch_size": 8, "ema_decay": 0.9, "checkpoint_every": 3, "log_every": 1}
    return build(TrainConfig, {**tree, "optimizer": optimizer, **changes})


class Recorder(TrainingCallback):
    """Keeps logged values, and checkpoints in ``folder``. A copy that is written at the end of training is the same."""

    def __init__(self, folder: Path, engine: Any, discriminator: Any = None) -> None:
        self.folder, self.engine, self.discriminator = folder, engine, discriminator
        self.values: dict[int, dict[str, float]] = {}
        self.copies: dict[int, dict[str, Shard]] = {}

    def on_log(self, step: int, values: dict[str, float]) -> None:
        self.values[step] = values

    def on_checkpoint(self, state: TrainState) -> None:
        save_checkpoint(self.folder / str(state.step), self.engine, state, self.discriminator)
        self.copies[state.step] = local_shards(self.engine, self.discriminator, copy=True)

    def on_end(self) -> None:
        for step, shards in self.copies.items():
            late = self.folder / f"late-{step}"
            write_shards(late, shards)
            files = list(late.rglob(f"*-{distributed.rank()}-of-*.safetensors"))
            assert len(files) == len(shards) * len(GROUPS)
            for file in files:
                assert file.read_bytes() == (self.folder / str(step) / file.relative_to(late)).read_bytes(), file


def samples(first: int, count: int) -> dict[str, torch.Tensor]:
    generators = [torch_generator("sample", number) for number in range(first, first + count)]
    latents = torch.stack([torch.randn(4, 3, 3, generator=g) for g in generators])
    return {"latents": latents, "label": torch.arange(first, first + count) % 4}


def work(changes: dict[str, Any], folder: Path, start: Path | None = None, lora: LoRAConfig | None = None) -> None:
    """Trains on one rank, only an adapter with ``lora``. Rank 0 writes the logged values."""
    config = settings(**{"num_workers": distributed.size(), **changes})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = DiT(DiTConfig(**SIZES))
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        if lora is not None:
            add_lora(model, lora)
    statistics = LatentStatistics([[0.0] * 3] * 3, 1.0)
    recipe = DiTTaskConfig(class_dropout=0.3, teacher_forcing=0.3, openings=2)
    task = DiTTask(model, recipe, DiffusionConfig(), statistics)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    engine = make_engine(model, config, CPU)
    state = load_checkpoint(start, engine, "key") if start else TrainState(0, 0, "key")

    def batches() -> Any:
        for step in range(state.step, STEPS):
            for part in config.micro_batches(distributed.rank(), distributed.size()):
                yield samples(step * 8 + part.start, len(part))

    recorder = Recorder(folder, engine)
    train(task, engine, batches(), config, state, [recorder])
    for name, parameter in model.named_parameters():  # ZeRO 3 and FSDP have sharded them
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        assert name not in frozen or hasattr(parameter, "ds_id") or torch.equal(whole, frozen[name])
    average = ema_model(engine)
    if distributed.rank() == 0:
        assert average is not None
        save_file(dict(average.named_parameters()), folder / "average.safetensors")
        (folder / "values.json").write_text(json.dumps(recorder.values))


def work_distilling(changes: dict[str, Any], folder: Path) -> None:
    """Distills on one rank: a student that starts from its teacher's weights."""
    config = settings(num_workers=distributed.size(), **changes)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        teacher, model = DiT(DiTConfig(**SIZES)), DiT(DiTConfig(**SIZES))
        for parameter in teacher.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.load_state_dict(teacher.state_dict())
    recipe, diffusion = DistillTaskConfig(trajectory_uses=3), DiffusionConfig(prediction="v")
    diffusion = diffusion_of_student(recipe, diffusion)
    task = DistillTask(model, teacher, recipe, diffusion, LatentStatistics([[0.0] * 3] * 3, 1.0))
    engine = make_engine(model, config, CPU)
    parts = config.micro_batches(distributed.rank(), distributed.size())
    batches = (samples(step * 8 + part.start, len(part)) for step in range(STEPS) for part in parts)
    train(task, engine, batches, config, TrainState(0, 0, "key"), [Recorder(folder, engine)])


def work_adversarially(changes: dict[str, Any], folder: Path, start: Path | None = None) -> None:
    """Trains an AR-VAE on one rank, with a discriminator from the third step on."""
    config = settings(num_workers=distributed.size(), gradient_accumulation=2, **changes)
    sizes = {"resolution": 16, "patch_size": 8, "num_tokens": 2, "width": 16, "depth": 1, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        small = DiscriminatorConfig(width=4, depth=2)
        recipe = AutoencoderTaskConfig(adversarial_weight=0.5, adversarial_from_step=2, discriminator=small)
        task = AutoencoderTask(ARAutoencoder(build(AutoencoderConfig, sizes)), recipe)
    assert task.discriminator is not None
    engine = make_engine(task.model, config, CPU)
    discriminator = make_discriminator_engine(task.discriminator, config, CPU)
    state = load_checkpoint(start, engine, "key", discriminator) if start else TrainState(0, 0, "key")

    def batches() -> Any:
        for part in range(state.step * 2, STEPS * 2):
            generator = torch_generator("clips", part, distributed.rank())
            yield {"video": torch.randint(0, 256, (2, 3, 16, 16, 3), dtype=torch.uint8, generator=generator)}

    train(
        task, engine, batches(), config, state, [Recorder(folder, engine, discriminator)], discriminator=discriminator
    )


def weights(folder: Path, part: str = "model") -> dict[str, torch.Tensor]:
    shards = ShardReader(folder)
    return {name: shards.read(part, name) for name in sorted(shards.names(part))}


def values(folder: Path) -> dict[str, dict[str, float]]:
    return json.loads((folder / "values.json").read_text())


def assert_close(ours: Path, theirs: Path, atol: float, parts: tuple[str, ...] = ("model", "ema", "optimizer")) -> None:
    for part in parts:
        one, other = weights(ours, part), weights(theirs, part)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            # The bias of the keys has no gradient but rounding errors, which Adam scales up to its learning rate.
            limit = 1e-2 if name.endswith(("kv.bias", "key_value.bias")) else atol
            assert torch.allclose(tensor, other[name], rtol=0, atol=limit), f"{part} {name}"


def assert_same(ours: Path, theirs: Path) -> None:
    for part in ("model", "ema", "optimizer"):
        one, other = weights(ours, part), weights(theirs, part)
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


def zero(stage: int, **changes: Any) -> dict[str, Any]:
    return {"engine": "deepspeed", "deepspeed": {"stage": stage, **changes}}


def work_on_text(changes: dict[str, Any], folder: Path) -> None:
    """Trains a model that takes text on one rank; every third clip has none."""
    config = settings(num_workers=distributed.size(), **changes)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = DiT(DiTConfig(**SIZES, condition="cross_attention", condition_dim=5))
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    task = DiTTask(model, DiTTaskConfig(), DiffusionConfig(), LatentStatistics([[0.0] * 3] * 3, 1.0))
    engine = make_engine(model, config, CPU)

    def batches() -> Any:
        for step in range(STEPS):
            for part in config.micro_batches(distributed.rank(), distributed.size()):
                rows = torch.arange(step * 8 + part.start, step * 8 + part.stop)
                states = (rows[:, None, None] + torch.arange(20).reshape(4, 5)).sin()  # (B, 4, 5)
                mask = (rows[:, None] % 3 > 0) & (torch.arange(4) <= rows[:, None] % 4)
                yield {**samples(step * 8 + part.start, len(part)), "text": states, "text_mask": mask}

    train(task, engine, batches(), config, TrainState(0, 0, "key"), [Recorder(folder, engine)])


MUON = {"optimizer": {"name": "muon", "lr": 1e-2, "muon_lr": 1e-2, "weight_decay": 0.01}}
LORA = LoRAConfig(rank=3, alpha=6.0)
WITH_LORA = ("torch", "fsdp", "zero0", "zero2", "zero3")
KINDS = {"torch": {}, "fsdp": {"engine": "fsdp"}, **{f"zero{stage}": zero(stage) for stage in range(4)}}


def work_all(folder: Path) -> None:
    """With every engine: a whole run, and one resumed from its third step; ZeRO 3 also from ZeRO 2."""
    for kind, changes in KINDS.items():
        settings = {"gradient_accumulation": 2, **changes}
        work(settings, folder / kind)
        work(settings, folder / f"{kind} resumed", folder / kind / "3")
    work(KINDS["zero3"], folder / "zero3 from zero2", folder / "zero2" / "3")
    work({**zero(2, offload_optimizer=True), "activation_checkpointing": True}, folder / "offloaded")
    work({**zero(3, offload_optimizer=True, offload_parameters=True)}, folder / "offloaded 3")
    for kind in ("torch", "fsdp", "zero2", "zero3"):
        work_adversarially(KINDS[kind], folder / f"{kind} gan")
        work_adversarially(KINDS[kind], folder / f"{kind} gan resumed", folder / f"{kind} gan" / "3")
        work_distilling({"gradient_accumulation": 2, **KINDS[kind]}, folder / f"{kind} student")
    for kind in WITH_LORA:
        work(KINDS[kind], folder / f"{kind} lora", lora=LORA)
        work(KINDS[kind], folder / f"{kind} lora resumed", folder / f"{kind} lora" / "3", LORA)
    work({**KINDS["fsdp"], "activation_checkpointing": True}, folder / "recomputed")
    work({**KINDS["fsdp"], **MUON}, folder / "muon")
    work_on_text(KINDS["fsdp"], folder / "text")
    work({**KINDS["fsdp"], "precision": "bf16"}, folder / "fsdp bf16")
    work({**zero(2), "precision": "bf16"}, folder / "bf16")
    work({**zero(2), "precision": "bf16"}, folder / "bf16 resumed", folder / "bf16" / "3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on two ranks, and ``alone`` on one rank with the torch engine."""
    folder = tmp_path_factory.mktemp("runs")
    work({}, folder / "alone")
    work_distilling({}, folder / "student alone")
    work({}, folder / "alone lora", lora=LORA)
    work(MUON, folder / "muon alone")
    work_on_text({}, folder / "text alone")
    run_workers(2, work_all, folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_workers_equal_one_with_plain_adamw(runs: Path, kind: str) -> None:
    """To 5e-6 in every weight, EMA weight and moment after six steps with a learning rate of 1e-2, in float32."""
    assert_close(runs / kind / "6", runs / "alone" / "6", 5e-6)
    ours, theirs = values(runs / kind), values(runs / "alone")
    assert ours.keys() == theirs.keys()
    for step in theirs:
        for name in ("loss", "grad_norm", "mean_timestep", "lr"):
            assert ours[step][name] == pytest.approx(theirs[step][name], rel=1e-5)


@pytest.mark.parametrize("kind", ["torch", "fsdp", "zero2", "zero3"])
def test_distillation_on_two_workers_equals_one(runs: Path, kind: str) -> None:
    """Trajectories depend neither on the number of workers nor on that of micro-batches."""
    assert_close(runs / f"{kind} student" / "6", runs / "student alone" / "6", 5e-6)


@pytest.mark.parametrize("kind", [*KINDS, "bf16"])
def test_resuming_is_exact(runs: Path, kind: str) -> None:
    assert_same(runs / f"{kind} resumed" / "6", runs / kind / "6")


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_with_another_number_of_workers(runs: Path, kind: str) -> None:
    """A checkpoint of two ranks and any ZeRO stage, on one rank without DeepSpeed: equal losses up to rounding."""
    folder = runs / f"{kind} alone"
    work({}, folder, runs / kind / "3")
    assert_close(folder / "6", runs / "alone" / "6", 5e-6)
    for step in ("4", "5", "6"):
        assert values(folder)[step]["loss"] == pytest.approx(values(runs / "alone")[step]["loss"], rel=1e-5)


UNEVEN = {kind: {**KINDS[kind], "num_workers": 4, "min_workers": 1} for kind in ("torch", "fsdp", "zero2", "zero3")}


def work_unevenly(folder: Path) -> None:
    """Three of at most four ranks with 2, 3 and 3 of 8 samples in two micro-batches each, from scratch and resumed."""
    for kind, changes in UNEVEN.items():
        work(changes, folder / f"{kind} uneven")
        work(changes, folder / f"{kind} from two", folder / kind / "3")


def test_workers_with_unequal_shares_equal_one(runs: Path) -> None:
    run_workers(3, work_unevenly, runs)
    for kind in UNEVEN:
        for name in (f"{kind} uneven", f"{kind} from two"):
            # Three ranks sum in another order than one. An AMD EPYC 7001 gives 8.1e-6 in one weight; a step moves 1e-2.
            assert_close(runs / name / "6", runs / "alone" / "6", 2e-5)
            for step in ("4", "5", "6"):
                for logged in ("loss", "mean_timestep"):
                    expected = values(runs / "alone")[step][logged]
                    assert values(runs / name)[step][logged] == pytest.approx(expected, rel=1e-5)


def test_resuming_at_another_stage(runs: Path) -> None:
    assert_close(runs / "zero3 from zero2" / "6", runs / "alone" / "6", 5e-6)


@pytest.mark.parametrize("kind", ["muon", "text"])
def test_fsdp_with_muon_and_with_text(runs: Path, kind: str) -> None:
    assert_close(runs / kind / "6", runs / f"{kind} alone" / "6", 5e-6)


def store_sizes(folder: Path) -> None:
    """The share of the model's numbers, and of its EMA's and moments', that this rank holds between updates."""
    model = DiT(DiTConfig(**SIZES))
    whole = sum(p.numel() for p in model.parameters())
    engine: Any = make_engine(model, settings(num_workers=2, engine="fsdp"), CPU)
    task = DiTTask(model, DiTTaskConfig(), DiffusionConfig(), LatentStatistics([[0.0] * 3] * 3, 1.0))
    loss, _ = engine.compute(lambda: task.loss(samples(0, 4), 0, BatchGenerator("sizes", 0)))
    engine.backward(loss)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    parts = {"gradients": sum(g.to_local().numel() for g in gradients)}
    engine.step(0, 1.0)
    moments = [s["exp_avg"] for o in engine.optimizers for s in o.state.values()]
    for name, tensors in (("weights", model.parameters()), ("ema", engine.ema.weights.values()), ("moments", moments)):
        parts[name] = sum(tensor.to_local().numel() for tensor in tensors)
    (folder / f"{distributed.rank()}.json").write_text(json.dumps({n: part / whole for n, part in parts.items()}))


def test_fsdp_shards_everything_that_training_keeps(tmp_path: Path) -> None:
    run_workers(2, store_sizes, tmp_path)
    for rank in (0, 1):
        shares = json.loads((tmp_path / f"{rank}.json").read_text())
        assert shares.keys() == {"gradients", "weights", "ema", "moments"}
        assert all(0.4 < share < 0.6 for share in shares.values()), shares


@pytest.mark.parametrize("kind", ["offloaded", "offloaded 3", "recomputed"])
def test_offloading_and_recomputation_change_nothing(runs: Path, kind: str) -> None:
    assert_close(runs / kind / "6", runs / "alone" / "6", 5e-6)


@pytest.mark.parametrize("kind", ["bf16", "fsdp bf16"])
def test_bf16_keeps_weights_in_float32(runs: Path, kind: str) -> None:
    ours, theirs = weights(runs / kind / "6"), weights(runs / "alone" / "6")
    rounded = [torch.equal(tensor, tensor.bfloat16().float()) for tensor in ours.values()]
    assert not all(rounded)
    for step, logged in values(runs / kind).items():
        assert logged["loss"] == pytest.approx(values(runs / "alone")[step]["loss"], rel=0.05)
    assert all((ours[name] - theirs[name]).abs().max() < 0.1 for name in ours)


def test_each_worker_writes_whole_tensors(runs: Path) -> None:
    for part in GROUPS:
        files = sorted((runs / "zero3" / "6").glob(f"{part}-*"))
        assert [f.name for f in files] == [f"{part}-{rank}-of-2.safetensors" for rank in (0, 1)]
        names = [set(load_file(file)) for file in files]
        assert names[0]
        assert names[1]
        assert not names[0] & names[1]
    model = DiT(DiTConfig(**SIZES))
    assert {n: t.shape for n, t in weights(runs / "zero3" / "6").items()} == {
        n: p.shape for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("kind", ["torch", "fsdp", "zero2", "zero3"])
def test_adversarial_training(runs: Path, kind: str) -> None:
    """Both networks equal those of the torch engine on two ranks, and resume exactly."""
    for place in ("6", "6/discriminator"):
        assert_close(runs / f"{kind} gan" / place, runs / "torch gan" / place, 1e-5, ("model", "ema"))
        assert_same(runs / f"{kind} gan resumed" / place, runs / f"{kind} gan" / place)


@pytest.mark.parametrize("kind", WITH_LORA)
def test_adapters(runs: Path, kind: str) -> None:
    """Equal on one rank and on two; only the adapter is in checkpoints, and no other weight changes."""
    assert_close(runs / f"{kind} lora" / "6", runs / "alone lora" / "6", 5e-6)
    assert_same(runs / f"{kind} lora resumed" / "6", runs / f"{kind} lora" / "6")
    assert {name.split(".lora_")[1] for name in weights(runs / f"{kind} lora" / "6")} == {"A.weight", "B.weight"}
    ours, adapter = (
        load_file(runs / f"{kind} lora" / "average.safetensors"),
        weights(runs / f"{kind} lora" / "6", "ema"),
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in adapter.items())
    theirs = load_file(runs / f"{kind} lora resumed" / "average.safetensors")
    unchanged = ours.keys() - adapter.keys()
    assert len(unchanged) > len(adapter)
    assert all(torch.equal(ours[name], theirs[name]) for name in unchanged)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in adapter.items() if "lora_B" in name)


def test_a_missing_shard_is_an_error(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "zero2" / "6", tmp_path / "copy")
    next((tmp_path / "copy").glob("ema-1-of-2*")).unlink()
    with pytest.raises(CheckpointError, match="files of 'ema' are missing"):
        ShardReader(tmp_path / "copy")


def measure_and_store(folder: Path) -> None:
    """Measures a run in which rank 1 waits for data."""
    ticks = itertools.count()
    meter = Meter(settings(num_workers=2), CPU, lambda: float(next(ticks)))  # a second between two looks at it
    with meter.waiting():
        time.sleep(0.6 * distributed.rank())
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(meter.read()))


def test_the_longest_wait_is_logged(tmp_path: Path) -> None:
    run_workers(2, measure_and_store, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["data_wait_share"] == second["data_wait_share"] > 0.5
    assert first["memory_gib"] == second["memory_gib"]


def draw_and_store(folder: Path) -> None:
    """Stores the noise of a rank's samples in six steps."""
    [part] = settings(num_workers=distributed.size()).micro_batches(distributed.rank(), distributed.size())
    rows = []
    for step in range(STEPS):
        draws = BatchGenerator("training", 0, step, first=part.start)
        rows.append(draws(len(part), lambda g: torch.randn(4, generator=g)))
    torch.save(torch.cat(rows), folder / f"{distributed.rank()}.pt")


def test_no_two_workers_ever_share_a_draw(tmp_path: Path) -> None:
    run_workers(2, draw_and_store, tmp_path)
    rows = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)])
    assert len(torch.unique(rows, dim=0)) == len(rows) == STEPS * 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_workers": 3}, "multiple of gradient_accumulation"),
        ({"num_workers": 3, "min_workers": 4}, "0 to num_workers"),
        ({"num_workers": 9, "min_workers": 1}, "at least gradient_accumulation"),
        ({"max_failures": -2}, "max_failures -1 or more"),
        ({"resize_interval": -1.0}, "resize_interval 0 or more"),
        ({**zero(2), "optimizer": {"name": "muon"}}, "needs optimizer.name=adamw"),
        (zero(0, offload_optimizer=True), "stage 1, 2 or 3"),
        (zero(2, offload_parameters=True), "needs stage 3"),
        ({**zero(0), "precision": "fp16"}, "needs stage"),
        ({"engine": "fsdp", "precision": "fp16"}, "use bf16, or engine=deepspeed"),
        ({"deepspeed": {"stage": 2}}, "for engine=deepspeed"),
        (zero(2, raw={"optimizer": {"type": "Adam"}}), "set train.optimizer"),
        (zero(2, raw={"gradient_clipping": 3.0}), "gradient_clipping = 3.0"),
        (zero(2, raw={"zero_optimization": {"stage": 3}}), "zero_optimization.stage = 3"),
        (zero(2, raw={"bf16": {"enabled": True}}), "bf16.enabled = True"),
        ({**zero(2, raw={"fp16": {"enabled": True}}), "precision": "bf16"}, "fp16.enabled = True"),
        (zero(2, raw={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}), "offload_optimizer.device"),
        ({**zero(1, raw={"data_types": {"grad_accum_dtype": "fp32"}}), "precision": "bf16"}, "set deepspeed.stage=2"),
        (zero(3, raw={"zero_optimization": {"offload_param": {"device": "nvme"}}}), "offload_param.device = 'nvme'"),
    ],
)
def test_contradictions_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def test_the_raw_section_is_merged() -> None:
    raw = {"zero_optimization": {"reduce_bucket_size": 1000, "stage": 2}, "wall_clock_breakdown": True}
    merged = settings(num_workers=2, **zero(2, raw=raw)).deepspeed_settings(2)
    assert merged["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert merged["wall_clock_breakdown"] is True
    assert merged["train_micro_batch_size_per_gpu"] == 4
