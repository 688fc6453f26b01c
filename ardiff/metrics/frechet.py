"""Distances between two sets of features: Frechet (FVD, FID), and those of kernels (KVD, KID, JEDi).

Shapes: N rows (videos or frames), D features; n1 rows are real, n2 generated. All arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

Features = np.ndarray | Tensor


def frechet_distance(real: Features, fake: Features, ddof: int = 1) -> float:
    """Squared Frechet distance between the Gaussians fitted to two feature sets.

    ``|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)`` (Dowson and Landau 1982; Heusel et al. 2017, Eq. 6). The
    cross term is the nuclear norm of ``Xc Yc^T / sqrt((n1 - ddof)(n2 - ddof))`` with ``Xc``, ``Yc`` the centred
    features: the singular values of that product are the eigenvalues of ``(S1 S2)^(1/2)``, so no matrix root of an
    almost singular covariance is needed. A side with more rows than features is first reduced to the R of its QR
    decomposition, which has the same singular values.

    Args:
        real: ``(n1, D)`` floating point. fake: ``(n2, D)`` floating point.
        ddof: Divisor of the covariances is ``n - ddof``: 1 is the unbiased estimate (the authors' protocol), 0 that of
            StyleGAN-V.

    Returns:
        The distance, at least 0.

    Raises:
        ValueError: A set is not a finite floating-point matrix of at least two rows, the widths differ, or ``ddof`` is
            neither 0 nor 1.
    """
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, not {ddof}")
    x, y = _matrices(real, fake)
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    root_x, root_y = _root(x - mean_x, ddof), _root(y - mean_y, ddof)
    cross = np.linalg.svd(root_x @ root_y.T, compute_uv=False).sum()
    distance = ((mean_x - mean_y) ** 2).sum() + (root_x**2).sum() + (root_y**2).sum() - 2.0 * cross
    return max(float(distance), 0.0)


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and scatter of rows, to compute distances without all rows in memory. All are float64."""

    count: int
    mean: np.ndarray
    """``(D,)``."""
    scatter: np.ndarray
    """``(D, D)``: the sum of outer products of the centred rows; over ``count - ddof`` it is the covariance."""

    @classmethod
    def of(cls, rows: Features) -> Moments:
        """Moments of ``(N, D)`` floating-point rows. Raises ValueError as :func:`frechet_distance` does, but N >= 1."""
        array = _matrix(rows, "moments'", least=1)
        mean = array.mean(axis=0)
        centred = array - mean
        return cls(len(array), mean, centred.T @ centred)

    @classmethod
    def of_all(cls, chunks: Iterable[Features]) -> Moments:
        """Moments of the rows of all chunks, merged in order."""
        merged: Moments | None = None
        for chunk in chunks:
            merged = cls.of(chunk) if merged is None else merged.merge(cls.of(chunk))
        if merged is None:
            raise ValueError("there are no rows to compute moments of")
        return merged

    def merge(self, other: Moments) -> Moments:
        """Moments of the rows of both (Chan, Golub and LeVeque 1979). They avoid the cancellation of plain sums."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"moments of {len(self.mean)} and {len(other.mean)} features cannot be merged")
        count, shift = self.count + other.count, other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, self.mean + shift * (other.count / count), scatter)

    def covariance(self, ddof: int = 1) -> np.ndarray:
        """``(D, D)``. Raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.count}")
        covariance: np.ndarray = self.scatter / (self.count - ddof)
        return covariance


def gaussian_distance(
    mean_real: np.ndarray, covariance_real: np.ndarray, mean_fake: np.ndarray, covariance_fake: np.ndarray
) -> float:
    """Squared Frechet distance between two Gaussians of given means ``(D,)`` and covariances ``(D, D)``.

    The cross term is the nuclear norm of ``A B^T``, where ``A^T A`` and ``B^T B`` are the covariances.
    """
    root_real, root_fake = _eigen_root(covariance_real), _eigen_root(covariance_fake)
    cross = np.linalg.svd(root_real @ root_fake.T, compute_uv=False).sum()
    traces = np.trace(covariance_real) + np.trace(covariance_fake)
    return max(float(((mean_real - mean_fake) ** 2).sum() + traces - 2.0 * cross), 0.0)


def frechet_from_moments(real: Moments, fake: Moments, ddof: int = 1) -> float:
    """:func:`frechet_distance` from the moments of two sets. Raises ValueError if the widths differ."""
    if real.mean.shape != fake.mean.shape:
        raise ValueError(f"real and fake must have the same number of features, got {len(real.mean)}, {len(fake.mean)}")
    return gaussian_distance(real.mean, real.covariance(ddof), fake.mean, fake.covariance(ddof))


def fast_distance(real: Moments, fake: Moments, ddof: int = 1) -> float:
    """:func:`frechet_from_moments` to about six digits in a fraction of the time, for estimates of spread.

    The cross term is the sum of the roots of the eigenvalues of ``L^T S2 L``, where ``L L^T`` is S1 (Cholesky). Its
    small eigenvalues lose digits, because rounding is relative to the largest.

    Raises:
        numpy.linalg.LinAlgError: The covariance of the real rows is singular.
    """
    root, covariance = np.linalg.cholesky(real.covariance(ddof)), fake.covariance(ddof)
    values = np.linalg.eigvalsh(root.T @ covariance @ root)
    cross = np.sqrt(np.maximum(values, 0.0)).sum()
    traces = (root**2).sum() + np.trace(covariance)
    return max(float(((real.mean - fake.mean) ** 2).sum() + traces - 2.0 * cross), 0.0)


def kernel_distance(real: Features, fake: Features) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel ``k(x, y) = (x.y / D + 1)^3``.

    Binkowski et al. 2018 (KID), on all rows instead of random subsets, so the value is deterministic. It is unbiased
    and so can be slightly negative. StyleGAN-V prints 1000 times this value.

    Args:
        real: ``(n1, D)`` floating point. fake: ``(n2, D)`` floating point.

    Raises:
        ValueError: A set is not a finite floating-point matrix of at least two rows, or the widths differ.
    """
    return kernel_distances([real], [fake], [[0]])[0]


def polynomial_distance(real: Features, fake: Features) -> float:
    """100 times the squared maximum mean discrepancy with the kernel ``k(x, y) = (x.y / D)^2``, diagonals included.

    JEDi (Luo et al. 2025). With the diagonals it is at least 0, and too large by about c / N.

    Args:
        real: ``(n1, D)`` floating point. fake: ``(n2, D)`` floating point.

    Raises:
        ValueError: A set is not a finite floating-point matrix of at least two rows, or the widths differ.
    """
    return polynomial_distances([real], [fake], [[0]])[0]


def kernel_distances(
    real: Sequence[Features], fake: Sequence[Features], unions: Sequence[Sequence[int]]
) -> list[float]:
    """:func:`kernel_distance` of unions of parts of both sets, of which the kernel of each pair is computed once."""
    x, y, between = _kernel_sums(_cubic, real, fake)
    return [x.mean(union, False) + y.mean(union, False) - 2.0 * between.mean(union, True) for union in unions]


def polynomial_distances(
    real: Sequence[Features], fake: Sequence[Features], unions: Sequence[Sequence[int]]
) -> list[float]:
    """:func:`polynomial_distance` of unions of parts of both sets, see :func:`kernel_distances`."""
    x, y, between = _kernel_sums(_square, real, fake)
    means = (x.mean(union, True) + y.mean(union, True) - 2.0 * between.mean(union, True) for union in unions)
    return [100.0 * max(mean, 0.0) for mean in means]


@dataclass(frozen=True, slots=True)
class _KernelSums:
    """Sums of a kernel over the pairs of rows of parts."""

    totals: np.ndarray
    """``(P, P)``: of all pairs of part i and part j."""
    diagonals: np.ndarray
    """``(P,)``: of the pairs of a row and itself."""
    rows: np.ndarray
    columns: np.ndarray
    """Rows of each part on either side, ``(P,)``."""

    def mean(self, union: Sequence[int], with_diagonal: bool) -> float:
        """The mean over the pairs of rows of a union of parts, with or without those of a row and itself."""
        index = list(union)
        total, pairs = self.totals[np.ix_(index, index)].sum(), self.rows[index].sum() * self.columns[index].sum()
        if with_diagonal:
            return float(total / pairs)
        return float((total - self.diagonals[index].sum()) / (pairs - self.rows[index].sum()))


def _kernel_sums(
    kernel: Callable[[np.ndarray, np.ndarray], np.ndarray], real: Sequence[Features], fake: Sequence[Features]
) -> tuple[_KernelSums, _KernelSums, _KernelSums]:
    """The sums within real parts, within generated parts, and between them."""
    parts = [_matrices(x, y) for x, y in zip(real, fake, strict=True)]
    sides = [[pair[side] for pair in parts] for side in (0, 1)]
    within = [_sums_within(kernel, side) for side in sides]
    totals = np.array([[kernel(a, b).sum() for b in sides[1]] for a in sides[0]])
    counts = [np.array([len(part) for part in side]) for side in sides]
    return within[0], within[1], _KernelSums(totals, np.zeros(len(parts)), *counts)


def _sums_within(kernel: Callable[[np.ndarray, np.ndarray], np.ndarray], parts: Sequence[np.ndarray]) -> _KernelSums:
    totals, diagonals = np.empty((len(parts), len(parts))), np.empty(len(parts))
    for i, part in enumerate(parts):
        own = kernel(part, part)
        totals[i, i], diagonals[i] = own.sum(), np.trace(own)
        for j in range(i):
            totals[i, j] = totals[j, i] = kernel(part, parts[j]).sum()
    counts = np.array([len(part) for part in parts])
    return _KernelSums(totals, diagonals, counts, counts)


def _root(centred: np.ndarray, ddof: int) -> np.ndarray:
    """A matrix ``A``, ``(min(N, D), D)``, with ``A^T A`` the covariance of the centred rows ``(N, D)``."""
    rows, width = centred.shape
    reduced = np.linalg.qr(centred, mode="r") if rows > width else centred
    return reduced / np.sqrt(rows - ddof)


def _eigen_root(covariance: np.ndarray) -> np.ndarray:
    """``A`` with ``A^T A`` the covariance. Eigenvalues that rounding makes negative become 0."""
    values, vectors = np.linalg.eigh(covariance)
    root: np.ndarray = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
    return root


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    kernel: np.ndarray = x @ y.T / x.shape[1] + 1.0
    return kernel * kernel * kernel  # ten times as fast as a power


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    kernel: np.ndarray = (x @ y.T / x.shape[1]) ** 2
    return kernel


def _matrices(real: Features, fake: Features) -> tuple[np.ndarray, np.ndarray]:
    x, y = _matrix(real, "real"), _matrix(fake, "fake")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"real and fake must have the same number of features, got {x.shape[1]} and {y.shape[1]}")
    return x, y


def _matrix(features: Features, name: str, least: int = 2) -> np.ndarray:
    array = features.detach().cpu().numpy() if isinstance(features, Tensor) else np.asarray(features)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{name} features must have shape (N, D), got {array.shape}")
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} features must be floating point, got {array.dtype}")
    if len(array) < least:
        raise ValueError(f"{name} features need at least {least} rows, got {len(array)}")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array).all(axis=1)).sum())
        raise ValueError(f"{name} features hold NaN or infinity in {bad} of {len(array)} rows")
    return array.astype(np.float64)
