"""Pictures of a finished video, for clients that ask for more than the video itself."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from ardiff.data.decode import decode_frames
from ardiff.data.storage import RangeReader
from ardiff.serving.records import JobRecord

SHEET_COLUMNS, SHEET_FRAMES = 4, 16


def thumbnail(record: JobRecord, video: RangeReader) -> bytes:
    """The first frame as WebP."""
    buffer = io.BytesIO()
    Image.fromarray(decode_frames(video, [0])[0]).save(buffer, "WEBP")
    return buffer.getvalue()


def spritesheet(record: JobRecord, video: RangeReader) -> bytes:
    """Evenly spaced frames in rows of four, as JPEG."""
    last = record.sampling.num_frames - 1
    wanted = np.unique(np.linspace(0, last, SHEET_FRAMES).round().astype(int)).tolist()
    pictures = [Image.fromarray(frame) for frame in decode_frames(video, wanted).values()]
    width, height = pictures[0].size
    sheet = Image.new("RGB", (SHEET_COLUMNS * width, -(-len(pictures) // SHEET_COLUMNS) * height))
    for index, picture in enumerate(pictures):
        row, column = divmod(index, SHEET_COLUMNS)
        sheet.paste(picture, (column * width, row * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


PREVIEWS: dict[str, tuple[str, Callable[[JobRecord, RangeReader], bytes]]] = {
    "thumbnail": ("image/webp", thumbnail),
    "spritesheet": ("image/jpeg", spritesheet),
}
"""Media type and function of each variant of a video's content."""
