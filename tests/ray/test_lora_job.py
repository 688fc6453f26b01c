"""`ardiff train-dit` with a low-rank adapter: from a pipeline to a merged one, and `ardiff export`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Result
from resuming import last_checkpoint

from ardiff.data.latents import LatentStatistics
from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiT, DiTConfig
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.pretrained import load_autoencoder

pytestmark = pytest.mark.ray
Command = Callable[..., Result]
SIZES: dict[str, Any] = {"num_frames": 8, "num_tokens": 2, "token_dim": 4, "width": 32, "depth": 2, "num_heads": 2}


def weights(pipeline: ARDiffusionPipeline) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in pipeline.dit.named_parameters()}


def test_an_adapter_from_a_pipeline_to_its_merged_one(
    cluster: None, ardiff: Command, latents: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    dit, vae = DiT(DiTConfig(**SIZES, num_classes=3)), load_autoencoder(str(latents / "vae"))
    base, statistics = tmp_path / "base", LatentStatistics([[0.0] * 4] * 2, 1.0)
    for parameter in dit.parameters():  # blocks start as the identity, through which no gradient reaches an adapter
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    start = ARDiffusionPipeline(vae, dit, DiffusionConfig(), statistics, ["a", "b", "c"])
    start.save_pretrained(str(base))
    settings = [f"latents={latents}", f"output={tmp_path}/run", "dit.num_classes=3", "files_per_chunk=2"]
    settings += [f"dit.{name}={value}" for name, value in SIZES.items()]
    settings += ["train.num_steps=4", "train.batch_size=4", "train.checkpoint_every=2", "train.cpu_threads=1"]
    settings += ["train.optimizer.lr=0.01", f"init_from={base}", "lora.rank=2"]
    ardiff("train-dit", *settings).expect(0)

    before, merged = weights(start), ARDiffusionPipeline.from_pretrained(f"{tmp_path}/run/pipeline")
    after = weights(merged)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
    assert changed == {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers}
    start.load_lora(f"{tmp_path}/run/pipeline/lora")
    assert all(torch.equal(p, after[name]) for name, p in weights(start).items())

    checkpoint = last_checkpoint(tmp_path / "run")
    ardiff("export", checkpoint, tmp_path / "exported").expect(0)
    exported = ARDiffusionPipeline.from_pretrained(str(tmp_path / "exported"))
    assert all(torch.equal(p, after[name]) for name, p in weights(exported).items())

    base.rename(tmp_path / "moved")
    assert "does not hold the pipeline" in ardiff("export", checkpoint, tmp_path / "again").complaint
    ardiff("export", checkpoint, tmp_path / "again", f"base_pipeline={tmp_path}/moved").expect(0)
    exported.save_pretrained(str(base))
    assert "no longer the pipeline" in ardiff("export", checkpoint, tmp_path / "third").complaint
    complaint = ardiff("train-dit", f"latents={latents}", f"output={tmp_path}/x", "lora.rank=2").complaint
    assert "lora.rank needs init_from" in complaint
