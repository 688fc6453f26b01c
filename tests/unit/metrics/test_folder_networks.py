"""V-JEPA, VideoMAE, V-JEPA 2, DINOv2 and CLIP with small random weights, against their formulas; and their files."""

import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from ardiff.data import storage
from ardiff.errors import CheckpointError, ConfigError, StorageError
from ardiff.metrics import registry, weights
from ardiff.metrics.distances import Polynomial
from ardiff.metrics.extractors import FeatureExtractor
from ardiff.metrics.folders import read_folder
from ardiff.metrics.frechet import polynomial_distance
from ardiff.metrics.networks.vjepa import VJEPA, VJEPA_EXTRACTOR
from ardiff.metrics.registry import find_network, find_spec

CPU = torch.device("cpu")


def clip(seed: int = 0, size: int = 224, frames: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (1, frames, size, size, 3), dtype=np.uint8)


def randomize(model: torch.nn.Module) -> Any:
    """Weights with which every tensor matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


# The authors' formulas, from tensors with the authors' names, in float64


def norm(state: dict[str, Tensor], name: str, x: Tensor, epsilon: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def mlp(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    hidden = linear(state, f"{name}.fc1", x)
    return linear(state, f"{name}.fc2", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Queries ``(M, D)`` over keys and values ``(N, D)``, head by head."""
    outputs = []
    for a, b, c in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        outputs.append(torch.softmax(a @ b.T / math.sqrt(a.shape[1]), dim=1) @ c)
    return torch.cat(outputs, dim=1)


def tokens(state: dict[str, Tensor], video: np.ndarray, mean: list[float], deviation: list[float]) -> Tensor:
    """The patches of a clip ``(F, H, W, 3)``, in order of time, rows and columns, times the kernel: ``(N, D)``."""
    kernel, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    _, _, t, p, _ = kernel.shape
    pixels = (torch.from_numpy(video).double() / 255 - torch.tensor(mean)) / torch.tensor(deviation)
    rows = []
    for i in range(0, pixels.shape[0], t):
        for j in range(0, pixels.shape[1], p):
            for k in range(0, pixels.shape[2], p):
                rows.append(pixels[i : i + t, j : j + p, k : k + p].permute(3, 0, 1, 2).reshape(-1))
    return torch.stack(rows) @ kernel.reshape(len(kernel), -1).T + bias


@torch.no_grad()
def vjepa_feature(encoder: dict[str, Tensor], probe: dict[str, Tensor], video: np.ndarray, heads: int) -> Tensor:
    """V-JEPA's encoder and the first block of its attentive classifier, as the authors' code computes them."""
    encoder, probe = ({k: v.double() for k, v in s.items()} for s in (encoder, probe))
    x = tokens(encoder, video, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) + encoder["pos_embed"][0]
    for i in range(2):
        name = f"blocks.{i}"
        q, k, v = linear(encoder, f"{name}.attn.qkv", norm(encoder, f"{name}.norm1", x, 1e-6)).chunk(3, dim=1)
        x = x + linear(encoder, f"{name}.attn.proj", attend(q, k, v, heads))
        x = x + mlp(encoder, f"{name}.mlp", norm(encoder, f"{name}.norm2", x, 1e-6))
    x, block = norm(encoder, "norm", x, 1e-6), "pooler.cross_attention_block"
    query = probe["pooler.query_tokens"][0]
    k, v = linear(probe, f"{block}.xattn.kv", norm(probe, f"{block}.norm1", x, 1e-5)).chunk(2, dim=1)
    attended = attend(linear(probe, f"{block}.xattn.q", query), k, v, heads)
    query = query + linear(probe, f"{block}.xattn.proj", attended)
    return (query + mlp(probe, f"{block}.mlp", norm(probe, f"{block}.norm2", query, 1e-5)))[0]


@pytest.fixture
def small_vjepa(monkeypatch: pytest.MonkeyPatch) -> VJEPA:
    """The network in a small size, also where it is registered."""
    build = functools.partial(VJEPA, width=24, depth=2, heads=4)
    registry.find_network("vjepa")
    monkeypatch.setitem(registry._networks, "vjepa", replace(VJEPA_EXTRACTOR, build=build))
    return randomize(build())


def test_jedi_is_that_of_the_authors(small_vjepa: VJEPA, tmp_path: Path) -> None:
    """From the authors' two checkpoints to features, and from features to the distance."""
    state = small_vjepa.state_dict()
    encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    probe = {k: v for k, v in state.items() if k.startswith("pooler.")}
    backbone = {f"module.backbone.{key}": value for key, value in encoder.items()}
    other = {key: value * 2 for key, value in backbone.items()}
    torch.save({"target_encoder": backbone, "encoder": other, "opt": {"step": 1}, "epoch": 3}, tmp_path / "a")
    head = {"module.linear.weight": torch.zeros(174, 24), "module.linear.bias": torch.zeros(174)}
    torch.save({"classifier": {f"module.{k}": v for k, v in probe.items()} | head, "epoch": 3}, tmp_path / "b")
    found, digest = weights.find_state("vjepa", (str(tmp_path / "a"), str(tmp_path / "b")))
    assert found.keys() == state.keys()
    assert digest == weights.state_sha256(small_vjepa)
    with pytest.raises(CheckpointError, match=r"does not fit the model: pooler\S+ is on one side only"):
        weights.find_state("vjepa", (str(tmp_path / "a"),))

    spec = replace(find_spec("jedi", "jedi"), network=find_network("vjepa"))
    video = clip()
    feature = FeatureExtractor(spec, found, CPU)(video)
    assert feature.shape == (1, 1, 24)
    expected = vjepa_feature(encoder, probe, video[0], heads=4)
    assert torch.from_numpy(feature[0, 0]).double() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    with pytest.raises(ConfigError, match="clips of 16 frames, not 32"):
        spec.network.check_frames(32)


def test_jedis_distance() -> None:
    """Sums over all pairs, those of a row and itself included, in plain Python."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(5, 3)), generator.normal(0.5, 2, (4, 3))

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return sum((sum(p * q for p, q in zip(u, v, strict=True)) / 3) ** 2 for u in a for v in b) / (len(a) * len(b))

    expected = 100 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert polynomial_distance(x, y) == pytest.approx(expected, rel=1e-12)
    assert Polynomial()(x[:, None], y[:, None]) == pytest.approx(expected, rel=1e-12)
    assert polynomial_distance(x, x) == 0
    assert find_spec("jedi", "jedi").distance == Polynomial()


def videomae_file(width: int = 32, depth: int = 2) -> dict[str, Tensor]:
    """The tensors of the authors' fine-tuned VideoMAE v2, in a small size."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, 2, 32, 32), "patch_embed.proj.bias": (width,),
        "fc_norm.weight": (width,), "fc_norm.bias": (width,), "head.weight": (174, width), "head.bias": (174,),
    }  # fmt: skip
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.{name}": shape
            for name, shape in {
                "norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,),
                "attn.q_bias": (width,), "attn.v_bias": (width,), "attn.qkv.weight": (3 * width, width),
                "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
                "mlp.fc1.weight": (48, width), "mlp.fc1.bias": (48,),
                "mlp.fc2.weight": (width, 48), "mlp.fc2.bias": (width,),
            }.items()
        }  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    return {key: torch.randn(shape, generator=generator) * 0.2 for key, shape in shapes.items()}


@torch.no_grad()
def videomae_feature(state: dict[str, Tensor], video: np.ndarray) -> Tensor:
    """``forward_features`` of the authors' VideoMAE v2: pixels of 0 to 1, fixed positions, mean, layer norm."""
    state = {key: value.double() for key, value in state.items()}
    x = tokens(state, video, [0.0] * 3, [1.0] * 3)
    width = x.shape[1]
    angles = np.array([[n / 10000 ** (2 * (d // 2) / width) for d in range(width)] for n in range(len(x))])
    x = x + torch.from_numpy(np.where(np.arange(width) % 2 == 0, np.sin(angles), np.cos(angles)))
    for i in range(2):
        name = f"blocks.{i}"
        q, k, v = (norm(state, f"{name}.norm1", x, 1e-6) @ state[f"{name}.attn.qkv.weight"].T).chunk(3, dim=1)
        q, v = q + state[f"{name}.attn.q_bias"], v + state[f"{name}.attn.v_bias"]  # keys have no bias
        x = x + linear(state, f"{name}.attn.proj", attend(q, k, v, 16))
        x = x + mlp(state, f"{name}.mlp", norm(state, f"{name}.norm2", x, 1e-6))
    return norm(state, "fc_norm", x.mean(dim=0), 1e-6)


def test_content_debiased_fvd_is_that_of_the_authors(tmp_path: Path) -> None:
    """From the authors' file, which says no configuration, to features."""
    state, video = videomae_file(), clip()
    torch.save({"module": state}, tmp_path / "vit_g.pth")
    found, digest = weights.find_state("videomae", (str(tmp_path / "vit_g.pth"),))
    spec = find_spec("cd-fvd", "cd-fvd")
    feature = FeatureExtractor(spec, found, CPU)(video)
    assert feature.shape == (1, 1, 32)
    expected = videomae_feature(state, video[0])
    assert torch.from_numpy(feature[0, 0]).double() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert spec.distance.ddof == 0
    changed = {**state, "fc_norm.bias": state["fc_norm.bias"] + 1}
    torch.save(changed, tmp_path / "other")
    assert weights.find_state("videomae", (str(tmp_path / "other"),))[1] != digest


# Model folders of the package transformers


def folders(root: Path) -> dict[str, tuple[str, Any]]:
    """A folder per network as the hub has them, and its model."""
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 24, "intermediate_size": 32}
    models = {
        "vjepa2": transformers.VJEPA2ForVideoClassification(
            transformers.VJEPA2Config(
                frames_per_clip=4, num_hidden_layers=1, num_attention_heads=2, hidden_size=24, mlp_ratio=2.0,
                pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=1, num_pooler_layers=1,
            )
        ),
        "videomae": transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**small)),
        "dinov2": transformers.Dinov2Model(
            transformers.Dinov2Config(
                num_hidden_layers=1, num_attention_heads=2, hidden_size=24, mlp_ratio=2, image_size=518, patch_size=14
            )
        ),
        "clip": transformers.CLIPModel(
            transformers.CLIPConfig(
                vision_config={**small, "patch_size": 32}, text_config={**small, "vocab_size": 9}, projection_dim=20
            )
        ),
    }  # fmt: skip
    for name, model in models.items():
        randomize(model).save_pretrained(root / name)
    return {name: (str(root / name), model) for name, model in models.items()}


METRICS = {
    "vjepa2": ("styleganv", "fd-vjepa2", 256), "videomae": ("cd-fvd", "cd-fvd", 224),
    "dinov2": ("styleganv", "fd-dinov2", 224), "clip": ("styleganv", "fd-clip", 224),
}  # fmt: skip
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


def expected_features(name: str, model: Any, video: np.ndarray) -> Tensor:
    """The features of a clip by the model that wrote the folder."""
    pixels = torch.from_numpy(video[0]).permute(0, 3, 1, 2).float() / 255  # (F, 3, S, S)
    match name:
        case "vjepa2":
            mean, deviation = (torch.tensor(v)[:, None, None] for v in IMAGENET)
            states = model.vjepa2.encoder(((pixels - mean) / deviation)[None]).last_hidden_state
            return states.mean(dim=1)
        case "videomae":
            states = model.videomae(pixels[None]).last_hidden_state
            return model.fc_norm(states.mean(dim=1))
        case "dinov2":
            mean, deviation = (torch.tensor(v)[:, None, None] for v in IMAGENET)
            return model((pixels - mean) / deviation).last_hidden_state[:, 0]
        case _:
            mean, deviation = (torch.tensor(v)[:, None, None] for v in CLIP)
            pooled = model.vision_model((pixels - mean) / deviation).pooler_output
            return model.visual_projection(pooled)


@torch.no_grad()
def test_model_folders_give_the_features_of_their_models(tmp_path: Path) -> None:
    for name, (folder, model) in folders(tmp_path).items():
        protocol, metric, size = METRICS[name]
        spec, video = find_spec(protocol, metric), clip(size=size, frames=16 if name == "videomae" else 4)
        found, digest = weights.find_state(name, (folder,))
        assert found.keys() >= {"config.json"}
        assert len(digest) == 64
        features = FeatureExtractor(spec, found, CPU)(video)
        assert features[0] == pytest.approx(expected_features(name, model, video).numpy(), rel=1e-3, abs=1e-4), name
        others = [other for other in METRICS if other != name]
        with pytest.raises(CheckpointError, match=f"no weights of the network '{others[0]}': give a folder"):
            weights.find_state(others[0], (folder,))


def test_model_folders_of_a_bucket_and_of_the_hub(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARDIFF_CACHE", str(tmp_path / "cache"))
    folder, _ = folders(tmp_path)["dinov2"]
    for file in Path(folder).iterdir():
        storage.write_bytes(f"{s3_bucket}/dino/{file.name}", file.read_bytes())
    assert weights.find_state("dinov2", (f"{s3_bucket}/dino",))[1] == weights.find_state("dinov2", (folder,))[1]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    with pytest.raises(
        CheckpointError, match=r"no feature network in nobody/nothing: it is no folder, and .*HF_HUB_OFFLINE"
    ):
        weights.find_state("dinov2", ("nobody/nothing",))
    with pytest.raises(StorageError, match=r"missing/dino\.pth"):  # a file, not a repository
        weights.find_state("dinov2", ("missing/dino.pth",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("kind", r"a model of the kind resnet; the kinds of feature networks are clip"),
        ("pickle", "holds no safetensors: convert its weights"),
        ("damaged", "cannot be read"),
        ("missing", "weights of the Dinov2Model lack"),
        ("size", "This CLIP takes frames of 336 pixels: give one that takes 224"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, change: str, message: str) -> None:
    folder = Path(folders(tmp_path)["clip" if change == "size" else "dinov2"][0])
    config = json.loads((folder / "config.json").read_text())
    match change:
        case "kind":
            config["model_type"] = "resnet"
        case "pickle":
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        case "damaged":
            (folder / "model.safetensors").write_bytes(b"words")
        case "missing":
            config["num_hidden_layers"] = 3
        case _:
            config["vision_config"]["image_size"] = 336
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        read_folder(str(folder))
