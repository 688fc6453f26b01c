"""Reads the frames of scored clips: of video files, folders of pictures and array files, cropped or stretched."""

from typing import Any, Literal

import numpy as np
import torch

from ardiff.data.clips import read_clip
from ardiff.data.manifest import record_of
from ardiff.data.pictures import crop, crop_square
from ardiff.metrics.arrays import is_array_video, read_array_clip
from ardiff.metrics.preprocess import resize_to_uint8
from ardiff.resolution import Resolution

Fit = Literal["crop", "stretch"]
"""How frames get another aspect ratio."""


def read_frames(clip: dict[str, Any], side: str, num_frames: int, resolution: Resolution | None) -> np.ndarray:
    """The frames of a clip, uint8 ``(F, H, W, 3)``.

    ``crop`` scales frames to cover ``resolution`` and keeps the centre; without ``resolution`` it keeps the central
    square, but frames of a pair are whole. ``stretch`` scales both sides.

    Args:
        clip: A :class:`~ray_jobs.evaluation.datasets.Clip` as a dictionary.
        side: ``video`` or ``original``.
        num_frames: Frames to read.
        resolution: Height and width in pixels; None keeps the size of the frames.

    Raises:
        DataError: The video cannot be decoded.
    """
    record, fit, is_pair = record_of(clip[side]), clip["fit"], clip["original"] is not None
    start, stride = int(clip["start"]), int(clip["stride"])
    if is_array_video(record.uri):
        frames = read_array_clip(record.uri, range(start, start + (num_frames - 1) * stride + 1, stride))
        if resolution is not None and fit == "crop":
            frames = crop(frames, resolution.largest_in(*frames.shape[1:3]))
    else:
        scaled = resolution if fit == "crop" else None
        frames = read_clip(record, start, num_frames, stride, scaled, float(clip["fps"]))
    if resolution is not None:
        return resize_to_uint8(torch.from_numpy(frames), resolution).numpy()
    return crop_square(frames) if fit == "crop" and not is_pair else frames
