"""Fixtures of the tests that need Ray.

``ardiff`` runs a job in the test's own process, on the one Ray cluster that all tests of a pytest worker share.
``jobs`` starts jobs in processes of their own, for tests whose subject is a process: how it is killed, interrupted,
set up or ended.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from jobs import Jobs, Result
from s3_server import S3Server, environment

from ardiff.cli import main
from ardiff.data.config import SyntheticConfig
from ardiff.data.latents import LatentSet, LatentStatistics, latent_table, write_description
from ardiff.data.manifest import write_manifest
from ardiff.data.synthetic_set import write_video
from ardiff.pretrained import save_autoencoder
from ardiff.vae import ARAutoencoder, AutoencoderConfig
from ray_jobs.runtime.cluster import ray_cluster

FIRST = ("quickstart", "submit", "resume", "ablate", "serve", "cluster_training", "json_logs")
"""Modules in the order in which pytest's workers are to begin them: those that start their own clusters, longest first.
All others follow."""
# A shell that runs the tests in the background makes them ignore SIGINT, and all the processes that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of this folder run first, in the order of ``FIRST``, so that two workers end at about the same time."""
    folder = Path(__file__).parent

    def position(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        if item.path.parent != folder:
            return len(FIRST) + 1
        return FIRST.index(name) if name in FIRST else len(FIRST)

    items.sort(key=position)


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    """Starts jobs in processes of their own."""
    jobs = Jobs()
    yield jobs
    jobs.close()


@pytest.fixture(scope="package")
def cluster(s3_server: S3Server) -> Iterator[None]:
    """A Ray cluster that this process has joined; jobs that run here use it. Its workers reach ``s3_server``.

    Ray's files are in ``$RAY_TMPDIR``.
    """
    before, folder = set(os.environ), tempfile.mkdtemp(prefix="rt-", dir="/tmp")
    os.environ["RAY_TMPDIR"] = folder
    with environment(s3_server.environment()):
        session = ray_cluster()
        session.__enter__()
    added = set(os.environ) - before
    yield
    session.__exit__(None, None, None)
    for name in added:
        os.environ.pop(name, None)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ardiff(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """``ardiff("command", "key=value", ...)`` in this process, on the shared cluster if the test uses ``cluster``."""

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 5 files with 60 clips each, and the AR-VAE that could have made them."""
    folder = tmp_path_factory.mktemp("latents")
    torch.manual_seed(0)
    sizes = AutoencoderConfig(resolution=16, patch_size=8, num_tokens=2, token_dim=4, width=16, depth=1, num_heads=2)
    save_autoencoder(str(folder / "vae"), ARAutoencoder(sizes))
    generator = np.random.default_rng(0)
    files = [f"part-{i}.parquet" for i in range(5)]
    for file in files:
        columns = {"latents": generator.normal(size=(60, 8, 2, 4)), "label": np.arange(60) % 3}
        pq.write_table(latent_table(columns), folder / file)
    statistics = LatentStatistics([[0.0] * 4] * 2, 1.0)
    names = ["a", "b", "c"]
    description = LatentSet("fabricated", 8, 2, 4, names, files, [60] * 5, statistics, str(folder / "vae"))
    write_description(str(folder), description)
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight videos of 12 frames."""
    folder = tmp_path_factory.mktemp("videos")
    config = SyntheticConfig(num_train=8, num_test=1, num_frames=12, num_long=0)
    write_manifest(str(folder / "manifest.parquet"), [write_video(config, str(folder), i, "train") for i in range(8)])
    return folder / "manifest.parquet"
