"""Decodes uploaded pictures and clips in a process of their own, which has limits and can be killed.

    python -m ardiff.serving.uploads LIMITS < upload > frames.npy

The process limits its memory, CPU time and files before it reads a byte. It starts without torch and without the
clients of storage.
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
from ardiff.data.filters import FilterMode, filters_for
from ardiff.data.pictures import crop
from ardiff.data.probe import probe
from ardiff.errors import ArdiffError, DataError, DecodeError
from ardiff.resolution import Resolution

_PICTURES = ("PNG", "JPEG", "WEBP")
_GIF = (b"GIF87a", b"GIF89a")
START_SECONDS = 20.0
"""Wall time for starting the process: on a busy machine, starting Python alone takes seconds."""
_REJECTED = 3
"""Exit status for a file that cannot be used; the reason is on standard error."""


async def decode_upload(
    data: bytes,
    resolution: Resolution,
    max_frames: int,
    max_pixels: int,
    seconds: float,
    memory_bytes: int,
    filters: tuple[FilterMode, FilterMode] = ("off", "off"),
) -> np.ndarray:
    """The frames of a picture (PNG, JPEG, WebP) or a short clip, scaled to cover ``resolution`` and cropped to its
    centre.

    Args:
        data: The whole file.
        resolution: Height and width of the returned frames.
        max_frames: Largest number of frames.
        max_pixels: Largest number of pixels of a frame, before scaling.
        seconds: CPU time and wall time after which the process is killed.
        memory_bytes: Address space of the process.
        filters: Whether clips that need it are deinterlaced and tone mapped.

    Returns:
        uint8 ``(k, H, W, 3)``.

    Raises:
        DataError: The file has another format, is damaged, or exceeds a limit. The message is for the client.
    """
    limits = json.dumps([resolution, max_frames, max_pixels, seconds, memory_bytes, filters])
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ardiff.serving.uploads", limits),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(seconds + START_SECONDS):
            output, reason = await process.communicate(data)
    except TimeoutError as error:
        raise DataError(f"The upload takes more than {seconds:g} s to decode.") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == _REJECTED:
        raise DataError(reason.decode(errors="replace").strip())
    if process.returncode:
        raise DataError("The upload cannot be decoded within the limits of time and memory.")
    return np.load(io.BytesIO(output), allow_pickle=False)


def _decode(
    data: bytes, resolution: Resolution, max_frames: int, max_pixels: int, filters: tuple[FilterMode, FilterMode]
) -> np.ndarray:
    if (picture := _picture(data, max_pixels)) is not None:
        scale, width, height = resolution.covering(*picture.size)
        scaled = picture.resize((width, height), Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
        return crop(np.asarray(scaled), resolution)[None]
    if data[:6] in _GIF:
        raise DecodeError(
            "it is a GIF, which is not supported: send a PNG, JPEG or WebP picture, or an mp4 or WebM clip"
        )
    clip = probe(data)
    if clip.width * clip.height > max_pixels:
        raise DecodeError(f"its frames are {clip.width} x {clip.height}, beyond the limit of {max_pixels} pixels")
    if clip.num_frames > max_frames:
        raise DecodeError(f"it has {clip.num_frames} frames, more than the {max_frames} allowed: cut it shorter")
    needed = filters_for(clip.warnings, *filters)
    return decode_clip(data, 0, clip.num_frames, resolution=resolution, filters=needed)


def _picture(data: bytes, max_pixels: int) -> Image.Image | None:
    """The upright picture without transparency, or None if the file is not a picture."""
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
    """The process: sets the limits, reads the file from standard input, writes the frames to standard output."""
    resolution, max_frames, max_pixels, seconds, memory_bytes, filters = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    limit = int(time.process_time() + seconds) + 1  # includes the time of starting
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Image.MAX_IMAGE_PIXELS = None  # max_pixels is checked instead
    try:
        frames = _decode(sys.stdin.buffer.read(), Resolution(*resolution), max_frames, max_pixels, filters)
    except ArdiffError as error:
        print(f"The upload cannot be used: {error}.", file=sys.stderr)
        return _REJECTED
    except MemoryError:
        print("The upload cannot be used: decoding it takes too much memory.", file=sys.stderr)
        return _REJECTED
    np.save(sys.stdout.buffer, frames, allow_pickle=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
