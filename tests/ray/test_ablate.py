"""An ablation at its smallest: two variants and one that fails, two seeds; and one that is killed and started again."""

import io
import json
import os
import re
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from resuming import wait_for_checkpoint

from ardiff.data import storage

pytestmark = pytest.mark.ray

SETTINGS = shlex.split("""
prepare.synthetic.num_train=16 prepare.synthetic.num_test=8 prepare.synthetic.num_frames=24 prepare.synthetic.num_long=0
train_vae.train.num_steps=6 train_vae.train.checkpoint_every=6 train_vae.train.sample_every=0
train_vae.train.log_every=3 train_vae.train.batch_size=8 train_vae.vae.width=32 train_vae.vae.depth=1
encode.batch_size=16 train_dit.train.num_steps=60 train_dit.train.checkpoint_every=5 train_dit.train.sample_every=0
train_dit.train.log_every=20 train_dit.train.batch_size=4 train_dit.dit.width=32 train_dit.dit.depth=1
generate.num_videos=4 generate.max_actors=1 generate.num_inference_steps=4 evaluate.num_clips=4 evaluate.batch_size=4
evaluate.max_actors=1 evaluate.i3d_clips=0 samples.long_frames=24 samples.long_ar_step=2
""")
VARIANTS = [
    {"name": "fopp", "question": "recipe"},
    {
        "name": "both",
        "question": "attention",
        "settings": ["train_dit.dit.attention=bidirectional", "generate.mode=full"],
    },
    {"name": "broken", "question": "tokens", "settings": ["train_dit.dit.num_tokens=3"]},
]


def arguments(folder: Path | str, variants: list[dict[str, Any]]) -> list[str]:
    return [
        f"--output={folder}",
        f"settings={json.dumps(SETTINGS)}",
        f"variants={json.dumps(variants)}",
        "seeds=[0, 1]",
        "ar_steps=[0, 2]",
        "table=",
    ]


@pytest.fixture(scope="module")
def finished(jobs: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("ablation") / "run"
    return folder, jobs.run("ablate", *arguments(folder, VARIANTS))


def test_a_variant_that_fails_is_a_row_and_the_others_go_on(finished: tuple[Path, Any]) -> None:
    folder, result = finished
    assert result.code == 1, result.err
    assert "2 of 6 units failed: broken with seed 0, broken with seed 1." in result.complaint
    frame = pd.read_parquet(folder / "results.parquet")
    assert len(frame) == 3 * 2 * 2
    measured, failed = frame[frame["reason"] == ""], frame[frame["reason"] != ""]
    assert set(measured["variant"]) == {"fopp", "both"}
    assert np.isfinite(measured[["distance", "recognised", "psnr", "reconstruction"]].to_numpy(dtype=float)).all()
    assert set(failed["variant"]) == {"broken"}
    assert failed["reason"].str.contains("dit.num_tokens is 3").all()
    assert json.loads((folder / "results.json").read_text())["about"]["measured"] == 6
    text = (folder / "ablation.md").read_text()
    assert "| tokens | `broken` | failed | failed |" in text
    assert "Incomplete" not in text
    assert (folder / "ablation.png").read_bytes().startswith(b"\x89PNG")
    # All of them were trained on the one AR-VAE, which was trained once.
    assert len(re.findall(r"✓ train-vae: [0-9.]+ s", result.err)) == 1
    assert len(re.findall(r"✓ train-dit: [0-9.]+ s", result.err)) == 4


def test_a_second_run_trains_nothing(jobs: Any, finished: tuple[Path, Any]) -> None:
    folder, _ = finished
    before = (folder / "results.parquet").read_bytes()
    result = jobs.run("ablate", *arguments(folder, VARIANTS))
    assert result.code == 1
    assert len(re.findall(r"✓ train-dit: done before", result.err)) == 4
    assert not re.search(r"✓ .*: [0-9.]+ s", result.err)
    assert (folder / "results.parquet").read_bytes() == before


@pytest.mark.slow
def test_an_ablation_on_s3_gives_the_same_numbers(jobs: Any, finished: tuple[Path, Any], s3_bucket: str) -> None:
    output = f"{s3_bucket}/ablation"
    jobs.environment |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    result = jobs.run("ablate", *arguments(output, VARIANTS[:1]))
    assert result.code == 0, result.err
    frame = pd.read_parquet(io.BytesIO(storage.read_bytes(f"{output}/results.parquet")))
    local = pd.read_parquet(finished[0] / "results.parquet")
    columns = ["seed", "ar_step", "distance", "recognised", "psnr"]
    pd.testing.assert_frame_equal(
        frame[columns], local.loc[local["variant"] == "fopp", columns].reset_index(drop=True), check_exact=True
    )
    assert "| recipe | `fopp` |" in storage.read_bytes(f"{output}/ablation.md").decode()
    assert storage.read_bytes(f"{output}/ablation.png").startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_killed_ablation_ends_with_the_same_numbers(jobs: Any, finished: tuple[Path, Any], tmp_path: Path) -> None:
    whole, folder = finished[0], tmp_path / "run"
    process = jobs.start("ablate", *arguments(folder, VARIANTS[:2]))
    place = folder / "both" / "seed-0" / "dit"
    deadline = time.monotonic() + 400
    while not place.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    wait_for_checkpoint(process, place)
    assert jobs.kill(process).code == -9
    assert not (place / "stage.json").exists(), "the unit ended before it could be killed: raise num_steps"
    assert jobs.left_over() == []
    result = jobs.run("ablate", *arguments(folder, VARIANTS[:2]))
    assert result.code == 0, result.err
    assert len(re.findall(r"✓ train-dit: done before", result.err)) == 1
    assert re.search(r"going on from the checkpoint of step \d+", result.err)
    columns = ["variant", "seed", "ar_step", "distance", "recognised", "psnr"]
    theirs, ours = (pd.read_parquet(place / "results.parquet")[columns] for place in (whole, folder))
    theirs = theirs[theirs["variant"] != "broken"].reset_index(drop=True)
    pd.testing.assert_frame_equal(theirs, ours, check_exact=True)
