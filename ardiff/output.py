"""What a call of the pipeline returns: an object with ``frames``, in the form that the caller asks for."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ardiff.data.encode import encode_video

OutputType = Literal["uint8", "np", "pt", "pil", "mp4"]


@dataclass(frozen=True, slots=True, eq=False)
class VideoOutput:
    """Generated videos."""

    frames: Any = field(repr=False)
    """The videos, as ``output_type`` says, see :func:`to_output`; ``frames[0]`` is the first one."""

    def _repr_html_(self) -> str | None:
        """Plays mp4 files where a notebook shows this object; None for other forms."""
        if not isinstance(self.frames, list) or not all(isinstance(video, bytes) for video in self.frames):
            return None
        sources = (f"data:video/mp4;base64,{base64.b64encode(video).decode()}" for video in self.frames)
        return "".join(f'<video src="{source}" width="192" controls autoplay loop muted></video>' for source in sources)


def check_output(output_type: OutputType, fps: float) -> None:
    """Raises ValueError if the type is unknown or ``fps`` is not positive."""
    if output_type not in get_args(OutputType):
        raise ValueError(f"output_type must be one of {', '.join(get_args(OutputType))}, got {output_type!r}")
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")


def to_output(videos: Tensor, output_type: OutputType, fps: float) -> VideoOutput:
    """Videos uint8 ``(B, F, H, W, 3)`` as ``output_type``; the forms of ``np``, ``pt`` and ``pil`` are diffusers'.

    - ``uint8``: the tensor itself, which ``condition`` takes.
    - ``np``: an array, float32 ``(B, F, H, W, 3)`` in 0..1.
    - ``pt``: a tensor, float32 ``(B, F, 3, H, W)`` in 0..1.
    - ``pil``: a list of PIL images for each video.
    - ``mp4``: the bytes of an H.264 file with ``fps`` frames per second for each video.
    """
    match output_type:
        case "uint8":
            return VideoOutput(videos)
        case "np":
            return VideoOutput((videos.float() / 255).numpy())
        case "pt":
            return VideoOutput(rearrange(videos, "b f h w c -> b f c h w").float() / 255)
        case "pil":
            return VideoOutput([[Image.fromarray(frame) for frame in video] for video in videos.numpy()])
        case "mp4":
            return VideoOutput([encode_video(video, fps) for video in videos.numpy()])


def draw_seeds(generators: torch.Generator | Sequence[torch.Generator], count: int) -> list[int]:
    """A seed for each video: ``count`` from one generator, or one from each of several, whose state advances."""
    if isinstance(generators, torch.Generator):
        generators = [generators] * count
    return [int(torch.randint(2**63 - 1, (), generator=g, device=g.device)) for g in generators]
