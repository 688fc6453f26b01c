"""The files and records of the synthetic set."""

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
    data = encode_video(frames, config.fps, crf=config.crf)
    uri = storage.join(root, split, scene.shape, f"{split}_{index:05d}.mp4")
    storage.write_bytes(uri, data)
    generator = numpy_generator("synthetic captions", config.seed, split, index)
    return VideoRecord(
        uri=uri,
        size=len(data),
        codec="h264",
        width=config.resolution.width,
        height=config.resolution.height,
        fps=config.fps,
        num_frames=len(frames),
        label=CLASSES.index(scene.shape),
        class_name=scene.shape,
        split=split,
        status="ok",
        reason="",
        captions=captions(scene, generator) if config.captions else (),
    )
