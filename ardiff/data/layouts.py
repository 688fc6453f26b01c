"""Dataset layouts: the class and the split of every video, from its path.

To add a layout, write its function here and add it to ``LayoutName`` and ``LAYOUTS``.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ardiff.data.manifest import Split
from ardiff.errors import DataError

LayoutName = Literal["folders", "ucf101", "sky", "taichi", "faceforensics"]
ClassAndSplit = tuple[str, Split]
"""Class name and split."""
SPLIT_FOLDERS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "test",
    "valid": "test",
    "validation": "test",
}
SPLIT_FILE = re.compile(r"(?:.*/)?splits/(train|val|test)\.json")


class Assignment(NamedTuple):
    """Where a video belongs."""

    class_name: str
    label: int
    """Class index."""
    split: Split


@dataclass(frozen=True, slots=True)
class Layout:
    """One way in which a data set lies in its folder."""

    expected: str
    """The expected paths, as an error shows them."""
    assign: Callable[[Sequence[str], Mapping[str, bytes], float], Sequence[ClassAndSplit | None]]
    """Assigns class and split to paths of videos; the other arguments are those of :func:`assign`."""
    split_file: re.Pattern[str] | None = None
    """Paths of the files that list the videos of a split."""


def assign(
    layout: LayoutName, paths: Sequence[str], split_files: Mapping[str, bytes], test_fraction: float
) -> list[Assignment | None]:
    """Class and split of every video; None for a video that belongs to no split.

    Args:
        layout: Name of the layout.
        paths: Paths of the videos below the source; those of folders end with a slash.
        split_files: Contents of the files for which :func:`is_split_file` is true, by path below the source.
        test_fraction: Share of test videos, for the layout ``folders`` without split folders.

    Raises:
        DataError: The paths do not fit the layout; the message shows the expected ones.
    """
    assigned = LAYOUTS[layout].assign([path.rstrip("/") for path in paths], split_files, test_fraction)
    if paths and not any(assigned):
        raise DataError(
            f"The videos do not fit layout={layout}, which expects {LAYOUTS[layout].expected}. The first video is "
            f"{paths[0].rstrip('/')}. See docs/data.md, or use layout=folders."
        )
    return with_labels(assigned)


def is_split_file(layout: LayoutName, path: str) -> bool:
    """Whether the file at ``path`` below the source lists the videos of a split."""
    pattern = LAYOUTS[layout].split_file
    return pattern is not None and pattern.fullmatch(path) is not None


def with_labels(assigned: Sequence[ClassAndSplit | None]) -> list[Assignment | None]:
    """Adds class indices, which number the class names in alphabetical order."""
    index = {name: i for i, name in enumerate(sorted({pair[0] for pair in assigned if pair}))}
    return [pair and Assignment(pair[0], index[pair[0]], pair[1]) for pair in assigned]


def split_by_lists(paths: Sequence[str], train: bytes, test: bytes) -> tuple[list[Split | None], list[str]]:
    """The split of every video by two lists of paths, one per line; None for a video on neither list.

    A line may end with a number, as in the lists of UCF-101, and may omit leading folders.

    Returns:
        The splits, and the lines that match no video.

    Raises:
        DataError: A list matches no video, a line matches several, or a video is on both lists.
    """
    exact, endings = dict[str, list[int]](), defaultdict[str, list[int]](list)
    for index, name in enumerate(paths):
        path = name.rstrip("/")
        exact[path] = [index]
        for start in [0, *(i + 1 for i, letter in enumerate(path) if letter == "/")]:
            endings[path[start:]].append(index)
    splits: list[Split | None] = [None] * len(paths)
    unmatched: list[str] = []
    lists: list[tuple[Split, bytes]] = [("train", train), ("test", test)]
    for split, text in lists:
        for line in filter(None, map(str.strip, text.decode("utf-8", "replace").splitlines())):
            candidates = [line.rstrip("/"), re.sub(r"\s+\d+$", "", line).rstrip("/")]
            matches = next(filter(None, (table.get(path) for path in candidates for table in (exact, endings))), [])
            if len(matches) > 1:
                raise DataError(
                    f"The line '{line}' of the {split} list matches {len(matches)} videos, such as "
                    f"{paths[matches[0]]} and {paths[matches[1]]}: write their paths below the source."
                )
            if not matches:
                unmatched.append(line)
            elif splits[matches[0]] not in (None, split):
                raise DataError(f"{paths[matches[0]]} is on both the train and the test list.")
            else:
                splits[matches[0]] = split
        if split not in splits:
            raise DataError(f"No video is on the {split} list: its lines must be paths below the source, one per line.")
    return splits, unmatched


def _folders(paths: Sequence[str], split_files: Mapping[str, bytes], test_fraction: float) -> list[ClassAndSplit]:
    """Class and split from folder names.

    A first folder called train, test or val names the split. Without one, ``test_fraction`` of the videos are test
    videos, chosen by a hash of their path. The next folder names the class. Without one, the class is ``video``. If all
    videos are in one split, the last one moves to the other.

    Raises:
        DataError: Some videos lie in split or class folders and others beside them; names one of these.
    """
    parts = [path.split("/") for path in paths]
    in_split = [len(p) > 1 and p[0].lower() in SPLIT_FOLDERS for p in parts]
    has_split = bool(parts) and all(in_split)
    split_names = {SPLIT_FOLDERS[p[0].lower()] for p, inside in zip(parts, in_split, strict=True) if inside}
    if not has_split and len(split_names) == 2:
        stray = paths[in_split.index(False)]
        raise DataError(f"{stray} lies beside the train and test folders: move it into one of them, or out.")
    inner = [p[1:] for p in parts] if has_split else parts
    in_class = [len(p) > 1 for p in inner]
    if any(in_class) and not all(in_class):
        stray, other = paths[in_class.index(False)], paths[in_class.index(True)]
        raise DataError(
            f"{stray} lies in no class folder, but {other} does: move the one into a class folder or the other out."
        )
    names = [p[0] for p in inner] if all(in_class) else ["video"] * len(inner)
    splits = [SPLIT_FOLDERS[p[0].lower()] if has_split else hashed_split("/".join(p), test_fraction) for p in parts]
    if len(set(splits)) == 1:
        splits[-1] = "test" if splits[-1] == "train" else "train"
    return list(zip(names, splits, strict=True))


def split_of_name(name: str) -> str:
    """The word for a split with which a name such as ``train-000.tar`` begins; empty if there is none."""
    word = re.match("[a-z]*", name.lower())
    return word[0] if word and word[0] in SPLIT_FOLDERS else ""


def hashed_split(path: str, test_fraction: float) -> Split:
    """The split of a video by a hash of its path: ``test_fraction`` of them are test videos."""
    draw = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "little") / 2**64
    return "test" if draw < test_fraction else "train"


def _ucf101(paths: Sequence[str], split_files: Mapping[str, bytes], test_fraction: float) -> list[ClassAndSplit | None]:
    """Groups 1 to 7 of every class are the test videos of the official list 1."""
    pattern = re.compile(r"(?:.*/)?([^/]+)/v_[^/]+_g(\d+)_c\d+\.avi")
    matches = [pattern.fullmatch(path) for path in paths]
    return [match and (match[1], "test" if int(match[2]) <= 7 else "train") for match in matches]


def _faceforensics(
    paths: Sequence[str], split_files: Mapping[str, bytes], test_fraction: float
) -> list[ClassAndSplit | None]:
    pattern = re.compile(r"(?:.*/)?original_sequences/youtube/[^/]+/videos/(\d+)(\.\w+)?")
    split_of: dict[str, Split] = {}
    for file, content in split_files.items():
        if match := SPLIT_FILE.fullmatch(file):
            try:
                split_of |= {str(number): SPLIT_FOLDERS[match[1]] for pair in json.loads(content) for number in pair}
            except (ValueError, TypeError) as error:
                raise DataError(f"{file} is not a list of pairs of video numbers ({error}).") from error
    assigned: list[ClassAndSplit | None] = []
    for path in paths:
        if official := pattern.fullmatch(path):
            split = split_of.get(official[1])
            assigned.append(("faceforensics", split) if split else None)
        elif "manipulated_sequences/" in path:
            assigned.append(None)
        else:
            assigned.append(_from_split_folder(path, "faceforensics"))
    return assigned


def _from_split_folder(path: str, class_name: str, prefix: str = "") -> ClassAndSplit | None:
    for folder in path.split("/")[:-1]:
        if split := SPLIT_FOLDERS.get(folder.lower().removeprefix(prefix)):
            return class_name, split
    return None


LAYOUTS: dict[LayoutName, Layout] = {
    "folders": Layout("[train|test/][class/]video.mp4, or folders of pictures instead of videos", _folders),
    "ucf101": Layout("UCF-101/<class>/v_<class>_g<group>_c<clip>.avi", _ucf101),
    "sky": Layout(
        "sky_train/<video>/<clip>/<frame>.jpg and sky_test/...",
        lambda paths, _files, _fraction: [_from_split_folder(path, "sky", "sky_") for path in paths],
    ),
    "taichi": Layout(
        "train/<video>.mp4/<frame>.png and test/..., or mp4 files instead",
        lambda paths, _files, _fraction: [_from_split_folder(path, "taichi") for path in paths],
    ),
    "faceforensics": Layout(
        "train|val|test/<video>, files or folders of pictures; or "
        "original_sequences/youtube/<quality>/videos/<number>.mp4 with splits/train.json, val.json and test.json",
        _faceforensics,
        SPLIT_FILE,
    ),
}
