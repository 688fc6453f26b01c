"""How data sets lie in their folders: which files are one video, and of what class and split each video is."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

from ardiff.data.clips import IMAGE_SUFFIXES, natural_order
from ardiff.data.manifest import SPLIT_FOLDERS, VIDEO_SUFFIXES, Split, class_and_split
from ardiff.data.storage import StoredFile
from ardiff.errors import DataError

Recipe = Literal["folders", "ucf101", "sky", "taichi", "faceforensics"]
Place = tuple[str, Split]
"""Class name and split."""
LAYOUTS: dict[Recipe, str] = {
    "folders": "[train|test/][class/]video.mp4, or folders of pictures in the place of videos",
    "ucf101": "UCF-101/<class>/v_<class>_g<group>_c<clip>.avi",
    "sky": "sky_train/<video>/<clip>/<frame>.jpg and sky_test/...",
    "taichi": "train/<video>.mp4/<frame>.png and test/..., or mp4 files in their place",
    "faceforensics": "train|val|test/<video>, files or folders of pictures; or "
    "original_sequences/youtube/<quality>/videos/<number>.mp4 with splits/train.json, val.json and test.json",
}


_SPLIT_LIST = re.compile(r"(?:.*/)?splits/(train|val|test)\.json")


def videos_of(source: str, files: Sequence[StoredFile]) -> list[StoredFile]:
    """The videos among the files below ``source``, sorted by name.

    A folder that holds pictures is one video, whose name ends with a slash; its etag is a hash over all of them.
    Pictures in a folder that also holds video files, itself or deeper, are none: they are posters and the like.
    """
    prefix = len(source.rstrip("/")) + 1
    found = [file for file in files if file.uri.lower().endswith(VIDEO_SUFFIXES)]
    holding = {folder for file in found for folder in _folders_above(file.uri)}
    folders = defaultdict[str, list[StoredFile]](list)
    for file in files:
        if file.uri.lower().endswith(IMAGE_SUFFIXES) and "/" in file.uri[prefix:]:
            folders[file.uri.rpartition("/")[0] + "/"].append(file)
    for folder in folders.keys() - holding:
        pictures = folders[folder]
        pictures.sort(key=lambda file: natural_order(file.uri))
        named = "".join(f"{p.uri[len(folder) :]}\0{p.size}\0{p.etag}\0" for p in pictures)
        etag = hashlib.sha256(named.encode()).hexdigest()[:32]
        found.append(StoredFile(folder, sum(p.size for p in pictures), etag))
    return sorted(found, key=lambda file: file.uri)


def _folders_above(uri: str) -> list[str]:
    return [uri[: i + 1] for i, letter in enumerate(uri) if letter == "/"]


def arrange(
    recipe: Recipe, names: Sequence[str], lists: Mapping[str, bytes], test_fraction: float
) -> list[tuple[str, int, Split] | None]:
    """Class name, class index and split of every video; None for one that belongs to no split.

    Args:
        recipe: How the set lies in its folder.
        names: Paths of the videos below the data folder; those of folders end with a slash.
        lists: The content of the files that say which video is of which split, by path below the data folder.
        test_fraction: Share of videos held out, for recipe ``folders`` where the folders do not say it.

    Raises:
        DataError: The videos lie otherwise; says how they should.
    """
    names = [name.rstrip("/") for name in names]
    match recipe:
        case "folders":
            return list(class_and_split(names, test_fraction))
        case "ucf101":
            places = [_ucf101(name) for name in names]
        case "sky":
            places = [_in_split_folder(name, "sky", "sky_") for name in names]
        case "taichi":
            places = [_in_split_folder(name, "taichi", "") for name in names]
        case "faceforensics":
            places = _faceforensics(names, lists)
    if not any(places):
        raise DataError(
            f"The videos do not lie as recipe={recipe} expects, {LAYOUTS[recipe]}; the first is {names[0]}. See "
            "docs/data.md, or take recipe=folders."
        )
    return numbered(places)


def numbered(places: Sequence[Place | None]) -> list[tuple[str, int, Split] | None]:
    """The places with the indices of their classes, which count the names that occur in their order."""
    index = {name: i for i, name in enumerate(sorted({place[0] for place in places if place}))}
    return [place and (place[0], index[place[0]], place[1]) for place in places]


def says_splits(recipe: Recipe, name: str) -> bool:
    """Whether the file at this path below the data folder is one of the recipe's lists."""
    return recipe == "faceforensics" and bool(_SPLIT_LIST.fullmatch(name))


def split_by_lists(names: Sequence[str], train: bytes, test: bytes) -> tuple[list[Split | None], list[str]]:
    """The split of every video by two lists of names, one a line; None for a video on neither.

    A line may end with a number, as UCF-101's do, and may leave out leading folders.

    Returns:
        The splits, and the lines that name no video.

    Raises:
        DataError: A list names no video at all, a line names several, or a video stands on both lists.
    """
    whole, endings = dict[str, list[int]](), defaultdict[str, list[int]](list)
    for number, name in enumerate(names):
        path = name.rstrip("/")
        whole[path] = [number]
        for start in [0, *(i + 1 for i, letter in enumerate(path) if letter == "/")]:
            endings[path[start:]].append(number)
    splits: list[Split | None] = [None] * len(names)
    unknown: list[str] = []
    lists: list[tuple[Split, bytes]] = [("train", train), ("test", test)]
    for split, text in lists:
        for line in filter(None, map(str.strip, text.decode("utf-8", "replace").splitlines())):
            wanted = [line.rstrip("/"), re.sub(r"\s+\d+$", "", line).rstrip("/")]
            found = next(filter(None, (places.get(path) for path in wanted for places in (whole, endings))), [])
            if len(found) > 1:
                raise DataError(
                    f"The line '{line}' of the {split} list names {len(found)} videos, as {names[found[0]]} and "
                    f"{names[found[1]]}: write their paths below the source."
                )
            if not found:
                unknown.append(line)
            elif splits[found[0]] not in (None, split):
                raise DataError(f"{names[found[0]]} stands on both the training and the test list.")
            else:
                splits[found[0]] = split
        if split not in splits:
            raise DataError(f"No video stands on the {split} list: its lines are paths below the source, one a video.")
    return splits, unknown


def _ucf101(name: str) -> Place | None:
    """Groups 1 to 7 of every class are the test videos of the official list 1."""
    if found := re.fullmatch(r"(?:.*/)?([^/]+)/v_[^/]+_g(\d+)_c\d+\.avi", name):
        return found[1], "test" if int(found[2]) <= 7 else "train"
    return None


def _in_split_folder(name: str, class_name: str, prefix: str) -> Place | None:
    for folder in name.split("/")[:-1]:
        if split := SPLIT_FOLDERS.get(folder.lower().removeprefix(prefix)):
            return class_name, split
    return None


def _faceforensics(names: Sequence[str], lists: Mapping[str, bytes]) -> list[Place | None]:
    pattern = re.compile(r"(?:.*/)?original_sequences/youtube/[^/]+/videos/(\d+)(\.\w+)?")
    numbers: dict[str, Split] = {}
    for path, content in lists.items():
        if found := _SPLIT_LIST.fullmatch(path):
            try:
                numbers |= {str(number): SPLIT_FOLDERS[found[1]] for pair in json.loads(content) for number in pair}
            except (ValueError, TypeError) as error:
                raise DataError(f"{path} is not a list of pairs of video numbers ({error}).") from error
    places: list[Place | None] = []
    for name in names:
        if official := pattern.fullmatch(name):
            split = numbers.get(official[1])
            places.append(("faceforensics", split) if split else None)
        elif "manipulated_sequences/" in name:
            places.append(None)
        else:
            places.append(_in_split_folder(name, "faceforensics", ""))
    return places
