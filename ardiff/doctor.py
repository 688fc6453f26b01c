"""``ardiff doctor``: checks whether this machine can run the jobs."""

import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import av
import psutil
import torch
from av.codec import Codec

EXTRAS = {"ray": "ray", "deepspeed": "train"}
"""The extra of ``pip install 'ardiff[...]'`` that brings a package."""

MIN_DRIVER = {"12": 525, "13": 580}
"""By CUDA's major version, the first NVIDIA driver that runs it (CUDA compatibility guide, minor versions)."""


class Finding(NamedTuple):
    """The result of a check."""

    name: str
    ok: bool
    text: str


def examine() -> int:
    """Prints the findings. Returns 0 if everything that the quickstart needs is available, else 1."""
    findings = [
        Finding("python", True, platform.python_version()),
        Finding("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads"),
        Finding("devices", True, _devices()),
        check_driver(torch.version.cuda, driver_version()),
        Finding("memory", True, f"{psutil.virtual_memory().total / 2**30:.0f} GiB, {os.cpu_count()} CPUs"),
        _package("ray", needed=True),
        Finding("ray cluster", True, os.environ.get("RAY_ADDRESS") or "RAY_ADDRESS is not set: jobs start one here"),
        _encoder("libx264", needed=True),
        _encoder("libvpx-vp9", needed=False),
        _encoder("libsvtav1", needed=False),
        _s3(),
        _package("deepspeed", needed=False),
        _deepspeed_ops(),
    ]
    return print_findings(findings, "MISSING")


def print_findings(findings: Iterable[Finding], failed: str) -> int:
    """Prints one line per finding, marked ``ok`` or ``failed``. Returns 0 if all are ok, else 1."""
    findings = list(findings)
    for name, ok, text in findings:
        print(f"{'ok' if ok else failed:<7}  {name:<14} {text}", flush=True)
    return 0 if all(finding.ok for finding in findings) else 1


def _devices() -> str:
    if not torch.cuda.is_available():
        return "CPU only"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def driver_version() -> str:
    """The version of this machine's NVIDIA driver, such as ``580.65.06``; empty without one."""
    file = Path("/proc/driver/nvidia/version")
    match = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", file.read_text()) if file.exists() else None
    return match[1] if match else ""


def check_driver(cuda: str | None, driver: str) -> Finding:
    """The driver is new enough for the CUDA version of torch; without a driver there is nothing to check."""
    if not driver:
        return Finding("nvidia driver", True, "none")
    if cuda is None:
        return Finding(
            "nvidia driver", False, f"{driver}, but this torch has no CUDA: install torch from PyPI on Linux"
        )
    least = MIN_DRIVER.get(cuda.partition(".")[0])
    if least is not None and int(driver.partition(".")[0]) < least:
        return Finding("nvidia driver", False, f"{driver}, but torch's CUDA {cuda} needs {least} or later: update it")
    return Finding("nvidia driver", True, f"{driver}, torch has CUDA {cuda}")


def _package(name: str, needed: bool) -> Finding:
    if _installed(name):
        return Finding(name, True, metadata.version(name))
    return Finding(name, not needed, f"not installed: pip install 'ardiff[{EXTRAS[name]}]'")


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _encoder(name: str, needed: bool) -> Finding:
    try:
        Codec(name, "w")
    except ValueError:
        return Finding(name, not needed, f"this build of PyAV {av.__version__} lacks the encoder")
    return Finding(name, True, f"PyAV {av.__version__}")


def _s3() -> Finding:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    endpoint = os.environ.get("AWS_ENDPOINT_URL", "AWS")
    try:
        session = boto3.Session()
        if session.get_credentials() is None:
            return Finding("s3", True, "no credentials: local paths only")
        buckets = session.client("s3").list_buckets()["Buckets"]
    except ClientError as error:
        if error.response["Error"]["Code"] == "AccessDenied":  # rights to single buckets are enough
            return Finding("s3", True, f"{endpoint}: reached; these credentials may not list buckets")
        return Finding("s3", False, f"{endpoint}: {error}")
    except BotoCoreError as error:
        return Finding("s3", False, f"{endpoint}: {error}")
    return Finding("s3", True, f"{endpoint}: {len(buckets)} buckets")


def _deepspeed_ops() -> Finding:
    if not _installed("deepspeed"):
        return Finding("deepspeed ops", True, "not needed: deepspeed is not installed")
    if missing := [tool for tool in ("ninja", "g++") if not shutil.which(tool)]:
        return Finding("deepspeed ops", False, f"cannot be compiled without {' and '.join(missing)}")
    return Finding("deepspeed ops", True, "can be compiled with ninja and g++")
