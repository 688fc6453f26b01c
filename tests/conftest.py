"""Shared by all tests: one thread and a seed for torch, factories of tiny models, and an S3 server."""

import atexit
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from postgres_server import PostgresServer, programs
from s3_server import S3Server, environment
from torch import nn

from ardiff.config import build
from ardiff.data.config import STORAGE_VARIABLE
from ardiff.data.latents import LatentStatistics
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.sampling_defaults import SamplingDefaults
from ardiff.diffusion.student import Student
from ardiff.dit import DiT
from ardiff.models import AnyAutoencoderConfig, AnyDiTConfig, make_autoencoder
from ardiff.models import make_dit as build_dit
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.sampling.text import Encoder
from ardiff.vae import ARAutoencoder

torch.set_num_threads(1)
# A separate cache: weights that a user has fetched must not change the tests or the jobs that they start.
os.environ["ARDIFF_CACHE"] = tempfile.mkdtemp(prefix="ardiff-tests-")
atexit.register(shutil.rmtree, os.environ["ARDIFF_CACHE"], ignore_errors=True)
# DeepSpeed compiles an operator at its first use. Checkouts with a shared cache would overwrite each other's.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
# Ray remembers the first token of a process, so all tests use one.
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

GOLDEN = Path(__file__).parent / "golden"
DIT = {"num_frames": 8, "num_tokens": 2, "width": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
VAE = {"resolution": 16, "patch_size": 8, "num_tokens": 2, "width": 16, "depth": 2, "num_heads": 2}


def _fill(model: nn.Module, seed: int = 0, std: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(std=std, generator=generator)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test and its fixtures draw without a generator of their own is the same in each run and each order."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def storage_settings() -> Iterator[None]:
    """A job that runs in this process sets its storage settings for the process: they end with the test."""
    before = os.environ.get(STORAGE_VARIABLE)
    yield
    os.environ.pop(STORAGE_VARIABLE, None)
    if before is not None:
        os.environ[STORAGE_VARIABLE] = before


@pytest.fixture(scope="session")
def golden_schedule() -> Callable[[str], Any]:
    """Reads a stored schedule, made with the authors' code or by exact enumeration."""
    return lambda name: json.loads((GOLDEN / "schedule" / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def make_dit() -> Callable[..., DiT]:
    """``make_dit(seed=0, **config)``: a tiny AR-DiT with normal weights, in evaluation mode."""

    def make(seed: int = 0, **changes: Any) -> DiT:
        model = build_dit(build(AnyDiTConfig, {**DIT, **changes}))
        _fill(model, seed)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_vae() -> Callable[..., ARAutoencoder]:
    """``make_vae(seed=0, **config)``: a tiny AR-VAE with normal weights, in evaluation mode."""

    def make(seed: int = 0, **changes: Any) -> ARAutoencoder:
        model = make_autoencoder(build(AnyAutoencoderConfig, {**VAE, "temporal_window": 3, **changes}))
        _fill(model, seed)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_pipeline(
    make_dit: Callable[..., DiT], make_vae: Callable[..., ARAutoencoder]
) -> Callable[..., ARDiffusionPipeline]:
    """``make_pipeline(text_encoder=None, student=None, sampling_defaults=None, **dit_config)``: a tiny pipeline of
    three named classes."""

    def make(
        text_encoder: Encoder | None = None,
        student: Student | None = None,
        sampling_defaults: SamplingDefaults | None = None,
        **changes: Any,
    ) -> ARDiffusionPipeline:
        dit, statistics = make_dit(**changes), LatentStatistics([[0.1, -0.2, 0.3, 0.0]] * 2, 0.8)
        names = ["disc", "ring", "square"][: dit.config.num_classes]
        diffusion = DiffusionConfig(student=student, sampling_defaults=sampling_defaults)
        return ARDiffusionPipeline(make_vae(seed=1), dit, diffusion, statistics, names, text_encoder=text_encoder)

    return make


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server for all tests of a pytest process. A test that stops it must start it again."""
    with S3Server() as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A real PostgreSQL server for all tests of a pytest process. A test that stops it must start it again."""
    if programs() is None:
        pytest.skip("PostgreSQL is not installed: run `make postgresql`")
    with PostgresServer() as server:
        yield server


@pytest.fixture
def s3_bucket(s3_server: S3Server) -> Iterator[str]:
    """The URL of an empty bucket. The environment variables that reach it are set."""
    with environment(s3_server.environment()):
        yield f"s3://{s3_server.make_bucket()}"
