"""What a distance between sets does not show: variety, quality, and copies of training videos.

Less variety or copies of real videos lower a Frechet distance below that of other real videos. These checks compare
generated clips with real clips by neighbours, and other real clips with the same real clips for reference.

Shapes: n reference clips, m other real clips, g generated clips, t training clips, D features.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NEIGHBOURS = 5
"""A clip's neighbourhood reaches to its fifth nearest neighbour, as in the authors' code of density and coverage."""
NEAR = 0.05
"""Generated clips are near a training clip if they are nearer than this share of the other real clips are."""
MIN_CLIPS = 4 * NEIGHBOURS
"""Clips of a side from which on neighbourhoods are compared."""
DEVIATIONS = 3.0
"""Standard deviations of sampling by which a share must differ before there is a warning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SetChecks:
    """Generated clips compared with real ones. Values for other real clips have the prefix ``real_``."""

    num_clips: int
    """Clips of each side of density and coverage; 0 if there are too few."""
    density: float | None = None
    """Mean number of reference neighbourhoods that a clip lies in, over k: quality, 1 on average for real clips."""
    real_density: float | None = None
    coverage: float | None = None
    """Share of the reference clips whose neighbourhood has a clip in it: variety."""
    real_coverage: float | None = None
    near: float | None = None
    """Share of clips nearer to a training clip than all but 5 % of the real ones: copies."""
    nearest: tuple[str, str] | None = None
    """The generated clip and the training clip that are nearest to each other."""
    duplicates: int
    """Generated clips whose pixels are those of an earlier one."""
    copies: int
    """Generated clips whose pixels are those of a real or training clip."""

    def describe(self) -> str:
        """The values on one line."""
        texts = []
        if self.density is not None and self.coverage is not None and self.near is not None:
            texts = [
                f"coverage {self.coverage:.0%} (real {self.real_coverage:.0%})",
                f"density {self.density:.2f} (real {self.real_density:.2f})",
                f"near a training clip {self.near:.0%} (real {NEAR:.0%})",
            ]
        return ", ".join([*texts, f"duplicates {self.duplicates}", f"copies {self.copies}"])

    def warnings(self) -> list[str]:
        """What is wrong with the set, a sentence each."""
        messages = []
        if self.coverage is not None and self.real_coverage is not None and self._is_low(self.coverage):
            messages.append(
                f"WARNING: generated clips reach {self.coverage:.0%} of the neighbourhoods of real clips, other real "
                f"clips {self.real_coverage:.0%}: they vary less. A distance does not always show that."
            )
        if self.density is not None and self.real_density is not None and self.density < self.real_density / 2:
            messages.append(
                f"WARNING: the density of generated clips is {self.density:.2f}, that of other real clips "
                f"{self.real_density:.2f}: many are unlike any real one."
            )
        if self.near is not None and self.nearest is not None and self.near > NEAR + self._spread(NEAR):
            messages.append(
                f"WARNING: {self.near:.0%} of the generated clips are nearer to a training clip than {1 - NEAR:.0%} of "
                f"the real clips are. They may be copies: compare {self.nearest[0]} with {self.nearest[1]}."
            )
        if self.duplicates:
            messages.append(f"WARNING: {self.duplicates} generated clips have the pixels of another generated clip.")
        if self.copies:
            messages.append(f"WARNING: {self.copies} generated clips have the pixels of a real clip.")
        return messages

    def _is_low(self, coverage: float) -> bool:
        assert self.real_coverage is not None
        return coverage < self.real_coverage - max(self._spread((coverage + self.real_coverage) / 2), 0.05)

    def _spread(self, share: float) -> float:
        """The difference of two shares of ``num_clips`` that sampling explains."""
        return DEVIATIONS * float(np.sqrt(2 * share * (1 - share) / self.num_clips))


@dataclass(frozen=True, slots=True)
class CheckedClips:
    """Features of clips, with the URI and a hash of the pixels of each."""

    features: np.ndarray
    """``(n, D)``."""
    uris: Sequence[str]
    hashes: Sequence[str]

    def __len__(self) -> int:
        return len(self.uris)

    def __getitem__(self, indices: Sequence[int]) -> "CheckedClips":
        return CheckedClips(self.features[indices], [self.uris[i] for i in indices], [self.hashes[i] for i in indices])


def check_set(
    reference: CheckedClips, others: CheckedClips, generated: CheckedClips, training: CheckedClips | None = None
) -> SetChecks:
    """Checks generated clips against real ones.

    Args:
        reference: Real clips.
        others: Real clips of other videos. All sides are cut to the size of the smallest.
        generated: Generated clips.
        training: The videos that the model was trained on; the reference without them.
    """
    known = set(reference.hashes) | set(others.hashes) | set(training.hashes if training else ())
    duplicates = sum(count - 1 for count in Counter(generated.hashes).values())
    copies = sum(name in known for name in generated.hashes)
    size = min(len(reference), len(others), len(generated))
    if size < MIN_CLIPS:
        return SetChecks(num_clips=0, duplicates=duplicates, copies=copies)
    keep = range(size)
    real, other, fake = reference[keep].features, others[keep].features, generated[keep].features
    radii = _radii(real)
    density, coverage = density_and_coverage(radii, distances(real, fake))
    real_density, real_coverage = density_and_coverage(radii, distances(real, other))
    seen = training if training is not None else reference
    to_training = distances(fake, seen.features)  # (size, t)
    limit = np.quantile(distances(other, seen.features).min(axis=1), NEAR)
    nearest = np.unravel_index(to_training.argmin(), to_training.shape)
    return SetChecks(
        num_clips=size,
        density=density,
        real_density=real_density,
        coverage=coverage,
        real_coverage=real_coverage,
        near=float((to_training.min(axis=1) < limit).mean()),
        nearest=(generated.uris[int(nearest[0])], seen.uris[int(nearest[1])]),
        duplicates=duplicates,
        copies=copies,
    )


def density_and_coverage(radii: np.ndarray, between: np.ndarray) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, Eq. 3 and 4), from radii ``(n,)`` and distances ``(n, g)``."""
    inside = between <= radii[:, None]
    density = float(inside.sum(axis=0).mean() / NEIGHBOURS)
    return density, float((between.min(axis=1) <= radii).mean())


def _radii(real: np.ndarray) -> np.ndarray:
    """The distance of each clip to its k-th nearest neighbour, ``(n, D)`` to ``(n,)``."""
    within = distances(real, real)
    np.fill_diagonal(within, np.inf)
    radii: np.ndarray = np.partition(within, NEIGHBOURS - 1, axis=1)[:, NEIGHBOURS - 1]
    return radii


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Euclidean distances, ``(n, D)`` and ``(m, D)`` to float64 ``(n, m)``."""
    first, second = x.astype(np.float64), y.astype(np.float64)
    shift = first.mean(axis=0)  # against cancellation
    first, second = first - shift, second - shift
    squared = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1) - 2.0 * first @ second.T
    root: np.ndarray = np.sqrt(np.maximum(squared, 0.0))
    return root
