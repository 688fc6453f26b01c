"""The files and records of the synthetic set."""

from dataclasses import replace

import numpy as np

from ardiff.data import storage
from ardiff.data.config import SyntheticConfig
from ardiff.data.encode import encode_video
from ardiff.data.manifest import Split, VideoRecord
from ardiff.data.synthetic import CLASSES, draw_scene, render_video
from ardiff.data.synthetic_captions import captions
from ardiff.randomness import numpy_generator


def write_video(config: SyntheticConfig, root: str, index: int, split: Split) -> VideoRecord:
    """Encodes video ``index`` as H.264 to ``root/<split>/<class>/<split>_<index>.mp4`` and returns its record."""
    scene, frames = draw_scene(config, index, split), render_video(config, index, split)
    generator = numpy_generator("synthetic captions", config.seed, split, index)
    record = store_video(frames, root, index, split, scene.shape, config.fps, config.crf)
    texts = captions(scene, generator) if config.captions else ()
    return replace(record, label=CLASSES.index(scene.shape), captions=texts)


def store_video(
    frames: np.ndarray, root: str, index: int, split: Split, class_name: str, fps: float, crf: int
) -> VideoRecord:
    """Encodes drawn ``frames``, uint8 ``(F, H, W, 3)``, as H.264 to ``root/<split>/<class>/<split>_<index>.mp4``.

    Returns the record of the video, of class 0 and without captions.
    """
    data = encode_video(frames, fps, crf=crf)
    uri = storage.join(root, split, class_name, f"{split}_{index:05d}.mp4")
    storage.write_bytes(uri, data)
    num_frames, height, width, _ = frames.shape
    return VideoRecord(
        uri=uri,
        size=len(data),
        codec="h264",
        width=width,
        height=height,
        fps=fps,
        num_frames=num_frames,
        label=0,
        class_name=class_name,
        split=split,
        status="ok",
        reason="",
    )
