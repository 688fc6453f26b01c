"""Videos and contact sheets of a sweep's report."""

from collections.abc import Sequence

import numpy as np

from ardiff.data import storage
from ardiff.data.decode import decode_clip
from ardiff.data.encode import contact_sheet, encode_video, tile
from ardiff.sweep.specs import VideoSpec
from ray_jobs.reports.html import Sheet, Video

TILES = 8
"""Videos of a point that play together."""
SHEET_SEEDS = 1
"""Seeds of each class and prompt that get a contact sheet."""
MAX_SHEETS = 64
"""Contact sheets of a report. Further classes and prompts have none."""
TILE_PIXELS = 96
"""Small videos are enlarged to this size, and videos beyond twice this size are reduced."""


def point_videos(specs: Sequence[VideoSpec], labels: dict[str, str], fps: float) -> list[Video]:
    """The first videos of each point in ``labels``, which play together; classes and prompts take turns."""
    videos = []
    for name, text in labels.items():
        of_point = [spec for spec in specs if spec.point == name]
        of_point.sort(key=lambda spec: (spec.sampling.seed, spec.sampling.class_label or 0))
        videos.append(play_together(text, "", of_point[:TILES], fps))
    return videos


def play_together(title: str, caption: str, specs: Sequence[VideoSpec], fps: float) -> Video:
    """One video with the videos of ``specs`` as tiles. Shorter ones start again until the longest ends."""
    clips = [_read_frames(spec) for spec in specs]
    longest = max(len(clip) for clip in clips)
    tiles = np.stack([clip[np.arange(longest) % len(clip)] for clip in _of_one_size(clips)])
    tiled = tile(tiles, columns=min(4, len(clips)), scale=max(TILE_PIXELS // tiles.shape[2], 1))
    return Video(title, caption, encode_video(tiled, fps, crf=23), "video/mp4")


def subject_sheets(specs: Sequence[VideoSpec], labels: dict[str, str]) -> list[Sheet]:
    """A contact sheet per class and prompt, with the same seed at every point in ``labels``, a row per point."""
    sheets = []
    order = list(labels)
    subjects = dict.fromkeys((spec.sampling.class_label, spec.sampling.prompt) for spec in specs)
    in_order = sorted(subjects, key=lambda subject: -1 if subject[0] is None else subject[0])
    for subject in in_order[:MAX_SHEETS]:
        of_subject = [s for s in specs if (s.sampling.class_label, s.sampling.prompt) == subject and s.point in labels]
        for seed in sorted({spec.sampling.seed for spec in of_subject})[:SHEET_SEEDS]:
            chosen = [spec for spec in of_subject if spec.sampling.seed == seed]
            chosen.sort(key=lambda spec: order.index(spec.point))
            clips = [_read_frames(spec) for spec in chosen]
            columns = min(16, max(len(c) for c in clips))
            shown = [c[np.linspace(0, len(c) - 1, columns).round().astype(int)] for c in clips]
            rows = np.stack(_of_one_size(shown))
            scale = max(TILE_PIXELS // 2 // rows.shape[2], 1)
            png = contact_sheet(rows, [labels[spec.point] for spec in chosen], scale=scale)
            title = f"{chosen[0].subject or 'Without a class'}, seed {seed}"
            sheets.append(Sheet(title, "The same noise at every point, a row each; time runs to the right.", png))
    return sheets


def _read_frames(spec: VideoSpec) -> np.ndarray:
    """uint8 ``(F, H, W, 3)``, reduced if the video is large."""
    video = decode_clip(storage.read_bytes(spec.uri), 0, spec.sampling.num_frames)
    factor = max(video.shape[1] // (2 * TILE_PIXELS), 1)
    return video[:, ::factor, ::factor]


def _of_one_size(clips: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Clips resized by nearest neighbours to the largest height, with white right of the narrower ones."""
    height = max(clip.shape[1] for clip in clips)
    resized = [_enlarge(clip, height) for clip in clips]
    width = max(clip.shape[2] for clip in resized)
    return [np.pad(clip, ((0, 0), (0, 0), (0, width - clip.shape[2]), (0, 0)), constant_values=255) for clip in resized]


def _enlarge(clip: np.ndarray, height: int) -> np.ndarray:
    """Resizes to ``height`` by nearest neighbours, with the same aspect ratio."""
    width = round(clip.shape[2] * height / clip.shape[1])
    rows, columns = (np.arange(new) * old // new for new, old in zip((height, width), clip.shape[1:3], strict=True))
    return clip[:, rows][:, :, columns]
