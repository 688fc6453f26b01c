"""Uploaded pictures and clips, decoded in a process of their own that can be killed, whatever the file does to it.

    python -m ardiff.serving.uploads LIMITS < upload > frames.npy

The process limits its own memory, processor time and files before it looks at a byte, and imports neither torch nor the
service.
"""

import asyncio
import io
import json
import resource
import sys
import time

import numpy as np
from PIL import Image, ImageOps

from ardiff.data.decode import decode_clip
from ardiff.data.probe import probe
from ardiff.errors import ArdiffError, DataError, DecodeError

_PICTURES = ("PNG", "JPEG", "WEBP")
_REFUSED = 3


async def decode_upload(
    data: bytes, resolution: int, max_frames: int, max_pixels: int, seconds: float, memory_bytes: int
) -> np.ndarray:
    """The frames of a picture (PNG, JPEG, WebP) or of a short video, scaled and cropped to the central square.

    Args:
        data: The whole file.
        resolution: R, the side of the frames that come back.
        max_frames: Frames that a video may have.
        max_pixels: Pixels of a frame, before scaling.
        seconds: Processor time and wall time after which the process is killed.
        memory_bytes: Address space of the process.

    Returns:
        uint8 ``(k, R, R, 3)``.

    Raises:
        DataError: The file is none of these, is damaged, or goes beyond a limit; the message is for its sender.
    """
    limits = json.dumps([resolution, max_frames, max_pixels, seconds, memory_bytes])
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ardiff.serving.uploads", limits),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        # Starting Python on a busy machine takes seconds of wall time that are not the file's fault.
        output, complaint = await asyncio.wait_for(process.communicate(data), seconds + 20)
    except TimeoutError as error:
        raise DataError(f"The upload takes more than {seconds:g} s to decode.") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == _REFUSED:
        raise DataError(complaint.decode(errors="replace").strip())
    if process.returncode:
        raise DataError("The upload cannot be decoded within the limits of time and memory.")
    return np.load(io.BytesIO(output), allow_pickle=False)


def _decode(data: bytes, resolution: int, max_frames: int, max_pixels: int) -> np.ndarray:
    if (picture := _picture(data, max_pixels)) is not None:
        scale = resolution / min(picture.size)
        width, height = (max(round(side * scale), resolution) for side in picture.size)
        left, top = (width - resolution) // 2, (height - resolution) // 2
        square = picture.resize((width, height), Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
        return np.asarray(square.crop((left, top, left + resolution, top + resolution)))[None]
    found = probe(data)
    if found.width * found.height > max_pixels:
        raise DecodeError(f"its frames are {found.width} x {found.height}, beyond the limit of {max_pixels} pixels")
    if found.num_frames > max_frames:
        raise DecodeError(f"it has {found.num_frames} frames, more than the {max_frames} allowed: cut it shorter")
    return decode_clip(data, 0, found.num_frames, resolution=resolution)


def _picture(data: bytes, max_pixels: int) -> Image.Image | None:
    """The file as a picture, upright and without transparency, or None if it is none."""
    try:
        picture = Image.open(io.BytesIO(data), formats=_PICTURES)
    except (OSError, SyntaxError, ValueError):
        return None
    if picture.width * picture.height > max_pixels:
        raise DecodeError(f"it is {picture.width} x {picture.height}, beyond the limit of {max_pixels} pixels")
    try:
        return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise DecodeError("the picture is damaged") from error


def main() -> int:
    """The process: limits first, then the file from standard input, the frames to standard output."""
    resolution, max_frames, max_pixels, seconds, memory_bytes = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    limit = int(time.process_time() + seconds) + 1  # with what was spent on starting
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Image.MAX_IMAGE_PIXELS = None  # the limit given here holds instead
    try:
        frames = _decode(sys.stdin.buffer.read(), resolution, max_frames, max_pixels)
    except ArdiffError as error:
        print(f"The upload cannot be used: {error}.", file=sys.stderr)
        return _REFUSED
    except MemoryError:
        print("The upload cannot be used: decoding it takes too much memory.", file=sys.stderr)
        return _REFUSED
    np.save(sys.stdout.buffer, frames, allow_pickle=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
