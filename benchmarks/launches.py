"""Kernels and waits of training, sampling and decoding on a GPU, counted without one.

    python benchmarks/launches.py                # the table of docs/performance.md, at the paper's sizes
    python benchmarks/launches.py --size tiny    # small models

The code runs on the meta device, whose tensors have no data, with the attention of GPUs. An operator counts as one
kernel: PyTorch's launches bound the speed of small batches on a GPU, and this is how many there are. Reading a value
from the device, for which the host waits, gives 0 here. Precision is that of the weights, without autocast.
"""

import argparse
import contextlib
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ardiff.data.latents import LatentStatistics
from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiT, DiTConfig
from ardiff.gpu_check.checks import SHAPES
from ardiff.gpu_check.launches import LaunchCounter, aten
from ardiff.gpu_check.setup import PAPER_DIT, PAPER_VAE, TINY_DIT, TINY_VAE
from ardiff.sampling.config import EngineConfig
from ardiff.sampling.engine import SamplingEngine
from ardiff.sampling.params import SamplingParams
from ardiff.sampling.request import SampleRequest
from ardiff.train.callbacks import TrainingCallback
from ardiff.train.checkpoint import TrainState
from ardiff.train.config import OptimizerConfig, TrainConfig
from ardiff.train.engines.base import ResultT
from ardiff.train.engines.torch_engine import TorchEngine
from ardiff.train.loop import train
from ardiff.train.tasks import DiTTask, DiTTaskConfig
from ardiff.vae import ARAutoencoder, AutoencoderConfig, DecoderCache

META = torch.device("meta")
DIFFUSION = DiffusionConfig()
STEPS, AR_STEP = 20, 5
"""Sampling steps, and those between neighbouring frames: 4 or 5 frames of a video are evaluated at a time."""
ITERATIONS = 2 * AR_STEP
"""Iterations of the engine whose mean is taken; after all requests have joined, one in each iteration."""
CLIPS = 16
MASK_KERNELS = 3
"""In each call of attention with a bool mask: two constants and a choice make it a bias."""


class MetaCounter(LaunchCounter):
    """Counts on the meta device what a GPU would run: fused attention, and 0 as each value that is read."""

    def __init__(self) -> None:
        super().__init__(META)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is not aten.scaled_dot_product_attention:
            return super().__torch_dispatch__(func, types, args, kwargs)
        query, value, mask = args[0], args[2], [*args[3:4], (kwargs or {}).get("attn_mask")]
        self.kernels += 1 + MASK_KERNELS * any(m is not None and m.dtype == torch.bool for m in mask)
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    def call(self, func: Any, args: Any, kwargs: Any, read: bool) -> Any:
        if not read:
            return func(*args, **kwargs)
        if func.overloadpacket is aten._local_scalar_dense:
            return 0.0 if args[0].is_floating_point() else 0
        if func.overloadpacket is aten._to_copy:
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=kwargs["device"])
        raise NotImplementedError(f"{func} has no result without data")


class FusedAttention(TorchFunctionMode):
    """Attention that is differentiated, as the operator of GPUs; on the meta device PyTorch would take it apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention and torch.is_grad_enabled():
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if attn_mask is not None:
            seen, unseen = (torch.full((), x, dtype=query.dtype, device=META) for x in (0.0, -torch.inf))
            attn_mask = torch.where(attn_mask, seen, unseen).expand(*query.shape[:2], -1, -1)
        output: Tensor = aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, True)[0]
        return output


@contextlib.contextmanager
def lists_of_tensors() -> Iterator[None]:
    """Has the optimizer and the norm of the gradients take one operator for a list of tensors, as on GPUs."""
    with contextlib.ExitStack() as stack:
        for module in map(importlib.import_module, ("torch.optim.optimizer", "torch.utils._foreach_utils")):
            patch = mock.patch.object(module, "_get_foreach_kernels_supported_devices", return_value=["meta"])
            stack.enter_context(patch)
        yield


class Steps(TrainingCallback):
    """Notes the counts after each training step."""

    def __init__(self, counter: LaunchCounter) -> None:
        self.counter, self.counts = counter, list[tuple[int, int]]()

    def on_step_end(self, step: int, loss: float) -> None:
        self.counts.append((self.counter.kernels, self.counter.syncs))


class CountedEngine(TorchEngine):
    """Knows the kernels of its last update. The meta device has no autocast."""

    counter: LaunchCounter
    of_update = 0

    def compute(self, function: Callable[[], ResultT]) -> ResultT:
        return function()

    def step(self, step: int, lr_factor: float) -> float:
        before = self.counter.kernels
        norm = super().step(step, lr_factor)
        self.of_update = self.counter.kernels - before
        return norm


def count_training(config: DiTConfig, teacher_forcing: float) -> tuple[int, int, int]:
    """Kernels of one training step of a micro-batch, those of its update alone, and waits, without logging."""
    with META:
        model = DiT(config)
        batch = {
            "latents": torch.empty(CLIPS, config.num_frames, config.num_tokens, config.token_dim),
            "label": torch.zeros(CLIPS, dtype=torch.int64),
        }
    settings = TrainConfig(num_steps=3, batch_size=CLIPS, log_every=100, optimizer=OptimizerConfig(lr=1e-4))
    statistics = LatentStatistics.neutral(config.num_tokens, config.token_dim)
    task = DiTTask(model, DiTTaskConfig(teacher_forcing=teacher_forcing), DIFFUSION, statistics)
    with FusedAttention(), lists_of_tensors(), MetaCounter() as counter:
        engine, steps = CountedEngine(model, settings.optimizer, META), Steps(counter)
        engine.counter = counter
        train(task, engine, itertools.repeat(batch), settings, TrainState(0, 0, ""), [steps])
    (kernels, syncs), after = steps.counts[:2]
    return after[0] - kernels, engine.of_update, after[1] - syncs


def count_sampling(model: DiT, requests: int, videos: int) -> tuple[float, float]:
    """Kernels and waits of one iteration of the sampling engine."""
    label = 0 if model.config.num_classes else None
    params = SamplingParams(class_label=label, num_frames=16, num_inference_steps=STEPS, ar_step=AR_STEP)
    engine = SamplingEngine(model, DIFFUSION, EngineConfig(max_requests=requests))
    request = SampleRequest(videos=tuple(replace(params, seed=seed) for seed in range(videos)))
    for _ in range(requests):
        engine.submit(request)
        engine.step()
    for _ in range(STEPS - requests):
        engine.step()
    with MetaCounter() as counter:
        for _ in range(ITERATIONS):
            engine.step()
    assert len(engine.iterations) == requests
    return counter.kernels / ITERATIONS, counter.syncs / ITERATIONS


@torch.inference_mode()
def count_decoding(config: AutoencoderConfig) -> tuple[int, int]:
    """Kernels and waits of decoding one frame that continues a long video."""
    with META:
        model = ARAutoencoder(config).eval()
        latents = torch.empty(1, 1, config.num_tokens, config.token_dim)
    cache = DecoderCache()
    for _ in range(config.temporal_window):
        model.decode(latents, cache)
    with MetaCounter() as counter:
        model.decode(latents, cache)
    return counter.kernels, counter.syncs


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["paper", "tiny"], default="paper", help="of the models")
    size = parser.parse_args(arguments).size
    dit, vae = (PAPER_DIT, PAPER_VAE) if size == "paper" else (TINY_DIT, TINY_VAE)
    print("| part | kernels | ratio | waits of the host |\n|---|---|---|---|")
    with META:
        model = DiT(dit).to(torch.bfloat16).eval()
    first = 0.0
    for requests, videos in SHAPES:
        kernels, syncs = count_sampling(model, requests, videos)
        first = first or kernels
        name = f"iteration of the sampling engine, {requests} x {videos} videos"
        print(f"| {name} | {kernels:.0f} | **{kernels / first:.2f}** | {syncs:g} |", flush=True)
    kernels, syncs = count_decoding(vae)
    print(f"| decoding of one frame | {kernels} | {kernels / first:.2f} | {syncs} |", flush=True)
    for name, teacher_forcing in (("", 0.0), (", teacher forcing", 1.0)):
        kernels, of_update, syncs = count_training(dit, teacher_forcing)
        name = f"training step of {CLIPS} clips{name}"
        print(f"| {name} | {kernels} | {kernels / first:.2f} | {syncs} |", flush=True)
        print(f"| of which the update of the weights | {of_update} | {of_update / first:.2f} | |", flush=True)


if __name__ == "__main__":
    main()
