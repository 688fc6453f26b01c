"""Folders of models of the package transformers: local, in a bucket, in the hub client's cache, or on the hub.

Text encoders are such models, and so are some feature networks of metrics. Their weights are safetensors; nothing is
unpickled, and no code of a repository runs.
"""

import fnmatch
import hashlib
import re
import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from ardiff import hub
from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.packages import cache_folder
from ardiff.errors import CheckpointError

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
_READ_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class Kind:
    """What a folder is, for error messages."""

    name: str
    needs: str
    """What it should hold."""


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


def hash_files(folder: Path) -> str:
    """A hash of the files of model and tokenizer."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if _is_wanted(file.name)):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as data:
            while block := data.read(_READ_BYTES):
                digest.update(block)
    return digest.hexdigest()


def put(folder: Path, target: Path) -> None:
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


def _from_storage(uri: str, kind: Kind) -> Path:
    """A copy in the cache, named by the etags of the files, so that changed files are copied again."""
    root = uri.rstrip("/")
    files = [file for file in storage.list_objects(root) if _is_wanted(file.uri[len(root) + 1 :])]
    if f"{root}/{CONFIG}" not in [file.uri for file in files]:
        raise CheckpointError(f"There is no {kind.name} in {uri}: it should hold {kind.needs}.")
    target = cache_folder() / "models" / fingerprint([[file.uri, file.size, file.etag] for file in files])
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            for file in files:
                storage.download_file(file.uri, Path(temporary) / "files" / file.uri[len(root) + 1 :])
            put(Path(temporary) / "files", target)
    return target


def _from_hub(name: str, kind: Kind) -> Path:
    """The repository in the hub client's cache; downloaded first if it is not there."""
    if (cached := hub.find(name, files=PATTERNS)) is not None:
        return cached
    try:
        return hub.download(name, files=PATTERNS)
    except CheckpointError as error:
        raise CheckpointError(
            f"There is no {kind.name} in {name}: it is no folder, and {str(error).rstrip('.')}. Check the name, or "
            "download it elsewhere and give its folder."
        ) from error


def _is_wanted(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS)
