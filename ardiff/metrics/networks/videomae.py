"""VideoMAE (Tong et al. 2022; v2: Wang et al. 2023), the network of content-debiased FVD, of any size.

A feature is the mean over the encoder's tokens, and the layer norm that follows it in fine-tuned models. Weights come
from a model folder, or from the file that the authors of content-debiased FVD use: ViT-g/14 of VideoMAE v2, fine-tuned
on Something-Something v2, ``vit_g_hybrid_pt_1200e_ssv2_ft.pth``.

Shapes: n clips, F frames, D width.
"""

import re
from typing import Any

from einops import rearrange, reduce
from torch import Tensor, nn

from ardiff.errors import CheckpointError, ConfigError
from ardiff.metrics.folders import make_model, pack
from ardiff.metrics.registry import Extractor, State, register_network

SIZE = 224
FRAMES = 16
HEADS = 16
"""Attention heads of ViT-g, which its file does not say."""
EPSILON = 1e-6


class VideoMAE(nn.Module):
    """The encoder, and the layer norm over the mean of its tokens if it is fine-tuned.

    Args:
        config: Configuration of a model folder; None for that of VideoMAE-B.
        tensors: The folder's weights; None for random ones.

    Raises:
        CheckpointError: It takes frames of other sizes or another number of them, or weights are missing.
    """

    def __init__(self, config: dict[str, Any] | None = None, tensors: State | None = None) -> None:
        super().__init__()
        settings = config or {}
        size, frames = settings.get("image_size", SIZE), settings.get("num_frames", FRAMES)
        if (size, frames) != (SIZE, FRAMES):
            raise CheckpointError(
                f"This VideoMAE takes {frames} frames of {size} pixels: give one that takes {FRAMES} of {SIZE}."
            )
        classifies = "VideoMAEForVideoClassification" in (settings.get("architectures") or [])
        fine_tuned = classifies and settings.get("use_mean_pooling", True)
        self.encoder = make_model("VideoMAEModel", "VideoMAEConfig", config, tensors)
        width = self.encoder.get_parameter("embeddings.patch_embeddings.projection.bias").shape[0]
        self.fc_norm = nn.LayerNorm(width, eps=EPSILON) if fine_tuned else None
        if self.fc_norm is not None and tensors is not None:
            try:
                self.fc_norm.load_state_dict({key: tensors[f"fc_norm.{key}"] for key in ("weight", "bias")})
            except KeyError as error:
                raise CheckpointError(f"The weights of this VideoMAE lack {error}.") from error

    def forward(self, video: Tensor) -> Tensor:
        """float ``(n, 16, 3, 224, 224)`` to ``(n, D)``."""
        mean = reduce(self.encoder(video).last_hidden_state, "n t d -> n d", "mean")
        return mean if self.fc_norm is None else self.fc_norm(mean)


def adopt(state: State) -> State | None:
    """The fine-tuned encoder of the authors' file, with the names of the package transformers."""
    if "patch_embed.proj.weight" not in state or "blocks.0.attn.q_bias" not in state:
        return None
    wide, _, tubelet, patch, _ = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    config = {
        "model_type": "videomae",
        "architectures": ["VideoMAEForVideoClassification"],
        "image_size": SIZE,
        "num_frames": FRAMES,
        "patch_size": patch,
        "tubelet_size": tubelet,
        "hidden_size": wide,
        "num_hidden_layers": depth,
        "num_attention_heads": HEADS,
        "intermediate_size": state["blocks.0.mlp.fc1.bias"].shape[0],
        "layer_norm_eps": EPSILON,
        "use_mean_pooling": True,
    }
    tensors: State = {}
    for key, value in state.items():
        if key.endswith("attn.qkv.weight"):
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                tensors[_renamed(key.replace("qkv", f"attention.{name}"))] = part.contiguous()
        elif not key.startswith("head."):
            tensors[_renamed(key)] = value
    return pack(tensors, config)


_NAMES = {
    r"^patch_embed\.proj": "encoder.embeddings.patch_embeddings.projection",
    r"^blocks\.": "encoder.encoder.layer.",
    r"\.attn\.q_bias": ".attention.attention.query.bias",
    r"\.attn\.v_bias": ".attention.attention.value.bias",
    r"\.attn\.attention": ".attention.attention",
    r"\.attn\.proj": ".attention.output.dense",
    r"\.mlp\.fc1": ".intermediate.dense",
    r"\.mlp\.fc2": ".output.dense",
    r"\.norm1": ".layernorm_before",
    r"\.norm2": ".layernorm_after",
}


def _renamed(key: str) -> str:
    for pattern, name in _NAMES.items():
        key = re.sub(pattern, name, key)
    return key


def _features(model: nn.Module, frames: Tensor, count: int) -> Tensor:
    """One row per clip: ``(n F, 3, 224, 224)`` to ``(n, 1, D)``."""
    return model(rearrange(frames, "(n f) c h w -> n f c h w", n=count))[:, None]


def _check_frames(num_frames: int) -> None:
    if num_frames != FRAMES:
        raise ConfigError(f"VideoMAE takes clips of {FRAMES} frames, not {num_frames}: give --frames {FRAMES}.")


VIDEOMAE_EXTRACTOR = Extractor(
    name="videomae",
    build=VideoMAE,
    kinds=("videomae",),
    adopt=adopt,
    size=SIZE,
    value_range="[0, 1]",
    features=_features,
    check_frames=_check_frames,
)
register_network(VIDEOMAE_EXTRACTOR)
