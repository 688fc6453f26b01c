"""Which videos are scored: random draws that are balanced over classes and depend on a seed and the videos' names only.

Two draws that share no video are exchangeable: neither the order of the files nor their classes show which is which.
"""

from collections.abc import Sequence

from ardiff.randomness import numpy_generator


def draw(names: Sequence[str], classes: Sequence[int], seed: int, purpose: str) -> list[int]:
    """The indices of all videos in a random order, every beginning of which is balanced over the classes.

    The order is made of rounds. A round has one video of each class that has any left, in random order.

    Args:
        names: The names of the videos, such as their URIs. Their order does not matter.
        classes: The class of each video.
        seed: Equal seeds give equal orders.
        purpose: What the draw is for; draws for different purposes are independent.
    """
    left = _shuffled_classes(names, classes, seed, purpose)
    generator = numpy_generator("order of classes", purpose, seed)
    order: list[int] = []
    while left:
        for label in generator.permutation(sorted(left)).tolist():
            order.append(left[label].pop())
            if not left[label]:
                del left[label]
    return order


def halves(names: Sequence[str], classes: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Two draws without a common video, which split each class equally. Sizes differ by one at most."""
    sides: tuple[list[int], list[int]] = ([], [])
    shuffled = _shuffled_classes(names, classes, seed, "halves")
    for number, index in enumerate(index for label in sorted(shuffled) for index in shuffled[label]):
        sides[number % 2].append(index)
    first, second = (
        [side[i] for i in draw([names[i] for i in side], [classes[i] for i in side], seed, f"half {number}")]
        for number, side in enumerate(sides)
    )
    return first, second


def _shuffled_classes(names: Sequence[str], classes: Sequence[int], seed: int, purpose: str) -> dict[int, list[int]]:
    """The indices of the videos of each class in random order."""
    members: dict[int, list[int]] = {}
    for index in sorted(range(len(names)), key=lambda index: names[index]):
        members.setdefault(int(classes[index]), []).append(index)
    return {
        label: [indices[i] for i in numpy_generator("choice", purpose, seed, label).permutation(len(indices))]
        for label, indices in members.items()
    }
