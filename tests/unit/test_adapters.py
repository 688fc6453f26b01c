"""Folders of low-rank adapters, which PEFT can read, and pipelines that load them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ardiff.adapters import CONFIG, WEIGHTS, read_adapter, save_adapter
from ardiff.dit import DiT
from ardiff.dit.config import LoRAConfig
from ardiff.dit.lora import add_lora
from ardiff.errors import CheckpointError

LORA = LoRAConfig(rank=3, alpha=6.0)
CALL = {"class_label": 1, "num_frames": 4, "num_inference_steps": 3}


def make_adapter(dit: DiT) -> dict[str, torch.Tensor]:
    """An adapter of a copy of ``dit`` that changes its output."""
    add_lora(dit, LORA)
    adapter = {name: p.detach() for name, p in dit.named_parameters() if ".lora_" in name}
    for number, tensor in enumerate(adapter.values()):
        tensor.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
    return adapter


def make_inputs(batch: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 5, 2, 4, generator=generator)
    return latents, torch.randint(1000, (batch, 5), generator=generator), torch.arange(batch)


def test_the_folder_holds_what_was_saved(make_dit: Any, tmp_path: Path) -> None:
    adapter = make_adapter(make_dit())
    save_adapter(str(tmp_path), adapter, LORA, "s3://models/base")
    found = read_adapter(str(tmp_path))
    assert found.scale == 2.0
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "s3://models/base"
    assert found.weights.keys() == adapter.keys()
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in adapter.items())


def test_peft_reads_the_folder(make_dit: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = make_dit()
    save_adapter(str(tmp_path), make_adapter(adapted), LORA, "")
    theirs = peft.PeftModel.from_pretrained(make_dit(), str(tmp_path))
    inputs = make_inputs(2)
    assert (adapted(*inputs) - make_dit()(*inputs)).abs().max() > 0.01
    assert torch.allclose(theirs.base_model.model(*inputs), adapted(*inputs), rtol=0, atol=1e-4)


def test_a_pipeline_reads_what_peft_has_written(make_pipeline: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pipeline = make_pipeline()
    theirs = peft.get_peft_model(make_pipeline().dit, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["qkv", "fc2"]))
    for number, (name, parameter) in enumerate(theirs.named_parameters()):
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    theirs.save_pretrained(str(tmp_path))
    pipeline.load_lora(str(tmp_path))
    inputs = make_inputs(1)
    assert torch.allclose(pipeline.dit(*inputs), theirs.base_model.model(*inputs), rtol=0, atol=1e-4)


def test_a_pipeline_loads_and_unloads_adapters(make_pipeline: Any, make_dit: Any, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    save_adapter(str(tmp_path), make_adapter(make_dit()), LORA, "")
    start = {name: p.clone() for name, p in pipeline.dit.named_parameters()}
    before = pipeline(**CALL).frames
    pipeline.load_lora(str(tmp_path))
    whole = pipeline(**CALL).frames
    assert not torch.equal(before, whole)
    pipeline.unload_lora()
    assert all(torch.equal(p, start[name]) for name, p in pipeline.dit.named_parameters())
    for _ in range(2):  # adapters add up
        pipeline.load_lora(str(tmp_path), strength=0.5)
    assert (pipeline(**CALL).frames.int() - whole.int()).abs().max() <= 1
    pipeline.unload_lora()
    pipeline.load_lora(str(tmp_path), strength=0.0)
    assert torch.equal(pipeline(**CALL).frames, before)


def test_a_saved_pipeline_has_the_adapter_merged(make_pipeline: Any, make_dit: Any, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    save_adapter(str(tmp_path / "lora"), make_adapter(make_dit()), LORA, "")
    pipeline.load_lora(str(tmp_path / "lora"))
    pipeline.save_pretrained(str(tmp_path / "saved"))
    again = type(pipeline).from_pretrained(str(tmp_path / "saved"))
    assert torch.equal(again(**CALL).frames, pipeline(**CALL).frames)


def test_an_adapter_of_another_model_changes_nothing(make_pipeline: Any, make_dit: Any, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    save_adapter(str(tmp_path), make_adapter(make_dit(width=32)), LORA, "")
    start = {name: p.clone() for name, p in pipeline.dit.named_parameters()}
    with pytest.raises(CheckpointError, match="does not fit the model"):
        pipeline.load_lora(str(tmp_path))
    assert all(torch.equal(p, start[name]) for name, p in pipeline.dit.named_parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "no plain LoRA, but LOHA"),
        ({"use_dora": True}, "no plain LoRA, but LORA with use_dora"),
        ({"r": 4}, "of another rank than adapter_config.json says, 4"),
        ({"r": "many"}, "is damaged"),
        ({"r": 0}, "is damaged"),
    ],
)
def test_other_adapters_are_refused(make_dit: Any, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_adapter(str(tmp_path), make_adapter(make_dit()), LORA, "")
    file = tmp_path / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message):
        read_adapter(str(tmp_path))


def test_damaged_folders(make_dit: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no adapter in"):
        read_adapter(str(tmp_path))
    save_adapter(str(tmp_path), make_adapter(make_dit()), LORA, "")
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(iter(tensors))
    save_file({**tensors, "base_model.model.token_in.weight": torch.zeros(2, 2)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="other tensors than lora_A and lora_B"):
        read_adapter(str(tmp_path))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="other tensors than lora_A and lora_B"):
        read_adapter(str(tmp_path))
    (tmp_path / WEIGHTS).write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_adapter(str(tmp_path))
