"""Tone mapping: pictures of high dynamic range (PQ and HLG) as SDR pictures, a function per published equation.

Light is linear and displayed, as a share of ``PEAK``. Pictures are ``(H, W, 3)``.
"""

import functools

import numpy as np

PEAK = 1000.0
"""Luminance of the brightest light that keeps detail, in cd/m2: the nominal peak of HLG displays (ITU-R BT.2100,
table 5), and of most PQ masters."""
WHITE = 203.0
"""Luminance of SDR white in cd/m2: that of HDR reference white (ITU-R BT.2408, table 1)."""
PQ, HLG = 16, 18
"""Transfer characteristics, ITU-T H.273, table 3."""

_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
_A, _B, _C = 0.17883277, 0.28466892, 0.55991073
_GAMMA = 1.2
_LUMINANCE_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)
_D65 = (0.3127, 0.3290)
_BT709 = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
_BT2020 = ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))
_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
# ITU-T H.273, table 2; HDR files that do not say (2) are BT.2020.
_PRIMARIES = {1: _BT709, 2: _BT2020, 9: _BT2020, 12: _P3}
_LEVELS = 65536


def tone_map(picture: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """An HDR picture as SDR: uint8 RGB with BT.709 primaries, for a display with the gamma of ITU-R BT.1886.

    Up to about 90 cd/m2 light stays as it is. Brighter light is compressed, so that ``PEAK`` becomes white; still
    brighter light is clipped, and so are colours beyond BT.709.

    Args:
        picture: RGB, uint16, with white at 255 * 256, where FFmpeg puts it when it converts YUV to 16 bits.
        transfer: ``PQ`` or ``HLG``.
        primaries: Of the picture, as in ITU-T H.273, table 2.

    Raises:
        ValueError: The primaries or the transfer are not supported.
    """
    if primaries not in _PRIMARIES:
        raise ValueError(f"its HDR pictures have colour primaries {primaries}, which tone mapping does not support")
    light = _look_up(_compression(), _displayed_light(picture, transfer))
    return _look_up(_display_codes(), light @ _to_bt709(primaries))


def pq_light(code: np.ndarray) -> np.ndarray:
    """The EOTF of SMPTE ST 2084: luminance in cd/m2 of PQ codes from 0 to 1."""
    root = np.power(code, 1 / _M2)
    return 10000 * np.power(np.maximum(root - _C1, 0) / (_C2 - _C3 * root), 1 / _M1)


def pq_code(luminance: np.ndarray) -> np.ndarray:
    """The inverse of :func:`pq_light`."""
    root = np.power(luminance / 10000, _M1)
    return np.power((_C1 + _C2 * root) / (1 + _C3 * root), _M2)


def hlg_scene_light(code: np.ndarray) -> np.ndarray:
    """The inverse OETF of HLG, ITU-R BT.2100, table 5: light of the scene, 0 to 1, of codes from 0 to 1."""
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - _C) / _A) + _B) / 12)


def compress_highlights(code: np.ndarray, peak: float = PEAK, white: float = WHITE) -> np.ndarray:
    """The EETF of ITU-R BT.2390, 5.4.1, for black at 0: PQ codes of displays with the luminance ``peak`` for displays
    with the luminance ``white``."""
    brightest = pq_code(np.array(peak))
    highest = pq_code(np.array(white)) / brightest
    knee = 1.5 * highest - 0.5
    e1 = np.minimum(code / brightest, 1)
    t = (e1 - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * highest
    return np.where(e1 < knee, e1, spline) * brightest


def _displayed_light(picture: np.ndarray, transfer: int) -> np.ndarray:
    """Light in units of ``PEAK``, at most 1: float32 ``(H, W, 3)``."""
    if transfer == PQ:
        return _pq_table()[picture]
    if transfer != HLG:
        raise ValueError(f"the transfer characteristic {transfer} is neither PQ nor HLG")
    scene = _hlg_table()[picture]
    return scene * _look_up(_ootf_table(), scene @ _LUMINANCE_2020)[..., None]  # the OOTF of BT.2100, table 5


def _look_up(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values from 0 to 1 looked up in a table that is even in their square root, as dark values need more steps."""
    return table[np.rint(np.sqrt(np.clip(values, 0, 1)) * (_LEVELS - 1)).astype(np.uint16)]


def _levels() -> np.ndarray:
    return np.arange(_LEVELS) / (_LEVELS - 1)


def _codes() -> np.ndarray:
    """The codes, 0 to 1, of values of a picture."""
    return np.minimum(np.arange(_LEVELS) / (255 * 256), 1)


@functools.cache
def _pq_table() -> np.ndarray:
    return np.minimum(pq_light(_codes()) / PEAK, 1).astype(np.float32)


@functools.cache
def _hlg_table() -> np.ndarray:
    return hlg_scene_light(_codes()).astype(np.float32)


@functools.cache
def _ootf_table() -> np.ndarray:
    """The factor by which a display brightens light of a luminance in the scene."""
    return np.power(_levels() ** 2, _GAMMA - 1).astype(np.float32)


@functools.cache
def _compression() -> np.ndarray:
    """Light in units of ``PEAK`` to light in units of ``WHITE``."""
    compressed = pq_light(compress_highlights(pq_code(PEAK * _levels() ** 2)))
    return (compressed / WHITE).astype(np.float32)


@functools.cache
def _display_codes() -> np.ndarray:
    """Light in units of ``WHITE`` to codes for a display of ITU-R BT.1886 whose black is 0."""
    return np.rint(255 * np.power(_levels() ** 2, 1 / 2.4)).astype(np.uint8)


@functools.cache
def _to_bt709(primaries: int) -> np.ndarray:
    """The matrix by which rows of linear RGB become BT.709: float32 ``(3, 3)``."""
    return (_to_xyz(_PRIMARIES[primaries]) @ np.linalg.inv(_to_xyz(_BT709))).astype(np.float32)


def _to_xyz(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """The matrix by which rows of RGB become CIE XYZ, for the white D65: SMPTE RP 177."""
    directions = np.array([(x / y, 1.0, (1 - x - y) / y) for x, y in (*primaries, _D65)])
    return np.linalg.solve(directions[:3].T, directions[3])[:, None] * directions[:3]
