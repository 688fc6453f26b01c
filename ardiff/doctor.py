"""``ardiff doctor``: what this machine has for the jobs, and what is missing."""

import importlib.util
import os
import platform
import shutil
from importlib import metadata

import av
import psutil
import torch
from av.codec import Codec

EXTRAS = {"ray": "ray", "deepspeed": "train"}
"""The extra of ``pip install 'ardiff[...]'`` that brings a package."""


def examine() -> int:
    """Prints one line per finding. Returns 0 if everything that the quickstart needs is there, else 1."""
    findings = [
        ("python", True, platform.python_version()),
        ("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("devices", True, _devices()),
        ("memory", True, f"{psutil.virtual_memory().total / 2**30:.0f} GiB, {os.cpu_count()} CPUs"),
        _package("ray", needed=True),
        ("ray cluster", True, os.environ.get("RAY_ADDRESS") or "none given (RAY_ADDRESS): jobs start one here"),
        _encoder("libx264", needed=True),
        _encoder("libvpx-vp9", needed=False),
        _encoder("libsvtav1", needed=False),
        _s3(),
        _package("deepspeed", needed=False),
        ("deepspeed ops", _can_build_ops() or not _has("deepspeed"), _ops()),
    ]
    return tell(findings, "MISSING")


def tell(findings: list[tuple[str, bool, str]], bad: str) -> int:
    """Prints a line for each ``(name, good, text)``, with the word ``bad`` where it is not good.

    Returns 0 if all are good, else 1.
    """
    for name, good, text in findings:
        print(f"{'ok' if good else bad:<7}  {name:<14} {text}", flush=True)
    return 0 if all(good for _, good, _ in findings) else 1


def _devices() -> str:
    if not torch.cuda.is_available():
        return "CPU only"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _package(name: str, needed: bool) -> tuple[str, bool, str]:
    if _has(name):
        return name, True, metadata.version(name)
    return name, not needed, f"not installed: pip install 'ardiff[{EXTRAS[name]}]'"


def _has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _encoder(name: str, needed: bool) -> tuple[str, bool, str]:
    try:
        Codec(name, "w")
    except ValueError:
        return name, not needed, f"this build of PyAV {av.__version__} cannot encode it"
    return name, True, f"PyAV {av.__version__}"


def _s3() -> tuple[str, bool, str]:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    endpoint = os.environ.get("AWS_ENDPOINT_URL", "AWS")
    try:
        session = boto3.Session()
        if session.get_credentials() is None:
            return "s3", True, "no credentials: local paths only"
        buckets = session.client("s3").list_buckets()["Buckets"]
    except ClientError as error:
        if error.response["Error"]["Code"] == "AccessDenied":  # rights to some buckets alone are as it should be
            return "s3", True, f"{endpoint}: reached, with rights to single buckets at most"
        return "s3", False, f"{endpoint}: {error}"
    except BotoCoreError as error:
        return "s3", False, f"{endpoint}: {error}"
    return "s3", True, f"{endpoint}: {len(buckets)} buckets"


def _can_build_ops() -> bool:
    return bool(shutil.which("ninja") and shutil.which("g++"))


def _ops() -> str:
    if not _has("deepspeed"):
        return "not needed: deepspeed is not installed"
    missing = [tool for tool in ("ninja", "g++") if not shutil.which(tool)]
    return f"cannot be built: no {' and no '.join(missing)}" if missing else "can be built (ninja and g++ are there)"
