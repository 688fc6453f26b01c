"""Models on a hub, through ``huggingface_hub``: found in its cache, downloaded, uploaded.

The network is used by :func:`download` and :func:`upload` only. The endpoint, the cache and the token are those of
``huggingface_hub`` (``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN``).
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from ardiff.errors import CheckpointError, ConfigError

FILES = ("README.md", "config.json", "dit.safetensors", "sheet.png", "vae.safetensors")
"""The files of a pipeline. No other file of a repository is read or written, so none that could hold code."""


def is_repo_id(name: str) -> bool:
    """Whether ``name`` has the form ``organisation/model`` of a hub repository."""
    has_form = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None and len(name) <= 96
    return has_form and re.search(r"--|\.\.|[.-]$|[.-]/|\.git$", name) is None


def find(repo_id: str, revision: str | None = None, files: Sequence[str] = FILES) -> Path | None:
    """The folder of a repository in the local cache; None if it is not there, or not complete.

    ``files`` are patterns of the names that are wanted, by default those of a pipeline.
    """
    try:
        hub = _package()
    except ConfigError:
        return None
    try:
        return Path(hub.snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[*files]))
    except (hub.errors.LocalEntryNotFoundError, hub.errors.HFValidationError):
        return None


def download(repo_id: str, revision: str | None = None, files: Sequence[str] = FILES) -> Path:
    """Downloads ``files`` of a repository into the cache, see :func:`find`. Returns its folder.

    Raises:
        CheckpointError: There is no such repository or revision, or the hub cannot be reached.
    """
    hub = _package()
    with _explain(f"{repo_id} cannot be downloaded"):
        return Path(hub.snapshot_download(repo_id, revision=revision, allow_patterns=[*files], library_name="ardiff"))


def upload(
    folder: Path, repo_id: str, *, revision: str | None = None, private: bool = False, message: str, token: str | None
) -> str:
    """Uploads the pipeline in ``folder``, and creates the repository and the branch ``revision`` if they are missing.

    Returns:
        The hash of the commit.

    Raises:
        CheckpointError: The hub cannot be reached, or does not allow it.
    """
    api = _package().HfApi(token=token, library_name="ardiff")
    with _explain(f"{folder} cannot be uploaded to {repo_id}"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message, allow_patterns=FILES
        )
    return commit.oid


def _package() -> ModuleType:
    """``huggingface_hub``. Raises ConfigError if it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ModuleNotFoundError as error:
        raise ConfigError("Models of a hub need the package huggingface_hub: pip install 'ardiff[hub]'.") from error
    return huggingface_hub


@contextlib.contextmanager
def _explain(what: str) -> Iterator[None]:
    """Raises CheckpointError that begins with ``what`` for errors of the hub and of the network, and for bad names."""
    hub = _package()
    try:
        yield
    except (
        hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, hub.errors.HFValidationError, OSError
    ) as error:  # fmt: skip
        raise CheckpointError(f"{what}: {' '.join(str(error).split())}") from error
