"""Tracks one object on a plain background, and checks that it moves as those of the synthetic set do.

Shapes: F frames, H W pixels. A video is uint8 ``(F, H, W, 3)``.
"""

from dataclasses import dataclass

import numpy as np
from einops import rearrange, reduce

# Limits of `motion_checks`. They were set on real synthetic clips only, raw and as H.264 at crf 8.
MIN_VISIBLE = 15 / 16
MAX_AREA_DRIFT = 0.08
MAX_COLOUR_DRIFT = 0.05
MAX_ACCELERATION = 0.5
MIN_SPEED, MAX_SPEED = 0.4, 3.0

MIN_CONTRAST = 40
"""Smallest difference in grey levels between an object's strongest pixel and the background, in any channel."""
MIN_COVER = 0.1
"""Smallest covered part of a pixel that counts; less is noise."""
ONE_OBJECT_SHARE = 0.9
"""Smallest share of the foreground in one connected piece for a frame with one object."""
MAX_OBJECT_SHARE = 0.5
"""Largest share of a frame that one object covers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracking:
    """A single object on a plain background, frame by frame; NaN for a frame without an object."""

    cover: np.ndarray
    """float32 ``(F, H, W)``: the part of each pixel that the foreground covers, 0 to 1."""
    one_object: np.ndarray
    """bool ``(F,)``: the foreground is one connected piece of at most half of the frame."""
    centroid: np.ndarray
    """float64 ``(F, 2)``: y and x in pixels."""
    area: np.ndarray
    """float64 ``(F,)``: pixels covered."""
    colour: np.ndarray
    """float64 ``(F, 3)``: mean RGB of the object's core, 0 to 255."""


def track(video: np.ndarray) -> Tracking:
    """Segments one video, uint8 ``(F, H, W, 3)``, from its background, the median colour of the frames' border.

    The object colour of a frame is the mean over the pixels with at least 0.7 of the strongest contrast. The cover of a
    pixel is its position between background and object colour, so a half-covered edge counts half.

    Raises:
        ValueError: Another dtype or shape.
    """
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"expected a uint8 video (F, H, W, 3), got {video.dtype} {video.shape}")
    frames = video.astype(np.float64)
    sides = [frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]]
    background = np.median(np.concatenate([rearrange(side, "f n c -> (f n) c") for side in sides]), axis=0)  # (3,)
    contrast = frames - background
    strength = np.abs(contrast).max(axis=-1)  # (F, H, W)
    strongest = strength.max(axis=(1, 2))  # (F,)
    visible = strongest >= MIN_CONTRAST
    core = (strength >= 0.7 * strongest[:, None, None]) & visible[:, None, None]
    with np.errstate(invalid="ignore"):  # 0 / 0 = NaN marks frames without an object
        mean = reduce(contrast * core[..., None], "f h w c -> f c", "sum") / core.sum(axis=(1, 2))[:, None]
        cover = np.einsum("fhwc,fc->fhw", contrast, mean) / (mean**2).sum(axis=1)[:, None, None]
        cover = np.where(cover >= MIN_COVER, np.minimum(cover, 1.0), 0.0)
        area = np.where(cover.any(axis=(1, 2)), cover.sum(axis=(1, 2)), np.nan)
        y = (cover.sum(axis=2) @ np.arange(video.shape[1])) / area
        x = (cover.sum(axis=1) @ np.arange(video.shape[2])) / area
    foreground = cover >= 0.5
    connected = _largest_piece(foreground) >= ONE_OBJECT_SHARE * foreground.sum(axis=(1, 2))
    return Tracking(
        cover=cover.astype(np.float32),
        one_object=foreground.any(axis=(1, 2)) & connected & (foreground.mean(axis=(1, 2)) <= MAX_OBJECT_SHARE),
        centroid=np.stack([y, x], axis=1),
        area=area,
        colour=background + mean,
    )


MOTION_CHECKS = ("one object", "steady area", "steady colour", "smooth motion", "plausible speed")


def motion_checks(tracking: Tracking) -> dict[str, bool]:
    """Whether one video shows a single object that keeps its appearance and moves evenly.

    ``one object``: in at least 15 of 16 frames. ``steady area``: standard deviation of the area over its mean.
    ``steady colour``: root mean square distance from the mean colour over 255. ``smooth motion``: median length of the
    centroid's second difference; the median ignores the few frames of a bounce. ``plausible speed``: median length of
    the first difference. All but the first use the frames with an object. A video without three such frames in a row
    fails all checks.
    """
    seen = np.isfinite(tracking.area)
    area, colour = tracking.area[seen], tracking.colour[seen]
    velocity = np.diff(tracking.centroid, axis=0)
    speed = np.linalg.norm(velocity, axis=1)
    acceleration = np.linalg.norm(np.diff(velocity, axis=0), axis=1)
    speed, acceleration = speed[np.isfinite(speed)], acceleration[np.isfinite(acceleration)]
    if len(acceleration) == 0:
        return dict.fromkeys(MOTION_CHECKS, False)
    colour_drift = np.sqrt(((colour - colour.mean(axis=0)) ** 2).sum(axis=1).mean()) / 255.0
    results = (
        tracking.one_object.mean() >= MIN_VISIBLE,
        area.std() <= MAX_AREA_DRIFT * area.mean(),
        colour_drift <= MAX_COLOUR_DRIFT,
        np.median(acceleration) <= MAX_ACCELERATION,
        MIN_SPEED <= np.median(speed) <= MAX_SPEED,
    )
    return {name: bool(result) for name, result in zip(MOTION_CHECKS, results, strict=True)}


def _largest_piece(foreground: np.ndarray) -> np.ndarray:
    """Pixels of the largest 8-connected piece of each frame: bool ``(F, H, W)`` to int64 ``(F,)``.

    Every foreground pixel starts with its own number and takes the largest number of its neighbours until nothing
    changes.
    """
    height, width = foreground.shape[1:]
    own = rearrange(np.arange(1, height * width + 1), "(h w) -> h w", h=height)
    label = np.where(foreground, own, 0)
    while True:
        spread = np.pad(label, ((0, 0), (1, 1), (1, 1)))
        spread = np.maximum(np.maximum(spread[:, :-2], spread[:, 1:-1]), spread[:, 2:])
        spread = np.maximum(np.maximum(spread[:, :, :-2], spread[:, :, 1:-1]), spread[:, :, 2:]) * foreground
        if np.array_equal(spread, label):
            return np.array([np.bincount(frame[frame > 0], minlength=1).max() for frame in label])
        label = spread
