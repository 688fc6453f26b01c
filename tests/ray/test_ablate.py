"""A small ablation: one variant that works, one that fails, two seeds; and an ablation that is killed and resumed."""

import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from jobs import Jobs, Result
from resuming import wait_for_checkpoint

from ardiff.cli import main
from ardiff.data import storage

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SETTINGS = shlex.split("""
prepare.synthetic.num_train=16 prepare.synthetic.num_test=8 prepare.synthetic.num_frames=24 prepare.synthetic.num_long=0
train_vae.train.num_steps=6 train_vae.train.checkpoint_every=6 train_vae.train.sample_every=0
train_vae.train.log_every=3 train_vae.train.batch_size=8 train_vae.vae.width=32 train_vae.vae.depth=1
encode.batch_size=16 train_dit.train.num_steps=60 train_dit.train.checkpoint_every=5 train_dit.train.sample_every=0
train_dit.train.log_every=20 train_dit.train.batch_size=4 train_dit.dit.width=32 train_dit.dit.depth=1
train_dit.task.teacher_forcing=0
generate.num_videos=4 generate.max_actors=1 generate.num_inference_steps=4 evaluate.num_clips=4 evaluate.batch_size=4
evaluate.max_actors=1 evaluate.i3d_clips=0 samples.long_frames=24 samples.long_ar_step=2
""")
VARIANTS = [
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
def finished(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation") / "run"
    assert main(["ablate", *arguments(folder, VARIANTS)]) == 1
    return folder


def test_a_variant_that_fails_is_a_row_and_the_others_are_measured(finished: Path) -> None:
    frame = pd.read_parquet(finished / "results.parquet")
    assert len(frame) == 2 * 2 * 2
    measured, failed = frame[frame["reason"] == ""], frame[frame["reason"] != ""]
    assert set(measured["variant"]) == {"both"}
    assert np.isfinite(measured[["distance", "frame_identity", "psnr", "reconstruction"]].to_numpy(dtype=float)).all()
    assert set(failed["variant"]) == {"broken"}
    assert failed["reason"].str.contains("dit.num_tokens is 3").all()
    assert json.loads((finished / "results.json").read_text())["about"]["measured"] == 4
    text = (finished / "ablation.md").read_text()
    assert "| tokens | `broken` | failed | failed |" in text
    assert "Incomplete" not in text
    assert (finished / "ablation.png").read_bytes().startswith(b"\x89PNG")
    # Both units were trained on one AR-VAE, which was trained once.
    assert len(list(finished.rglob("vae/stage.json"))) == 1
    assert len(list(finished.rglob("dit/stage.json"))) == 2


def test_a_second_run_trains_nothing(ardiff: Callable[..., Result], cluster: None, finished: Path) -> None:
    before = (finished / "results.parquet").read_bytes()
    result = ardiff("ablate", *arguments(finished, VARIANTS))
    assert result.code == 1
    assert "2 of 4 units failed: broken with seed 0, broken with seed 1." in result.complaint
    assert len(re.findall(r"✓ train-dit: done before", result.err)) == 2
    assert not re.search(r"✓ .*: [0-9.]+ s", result.err)
    assert (finished / "results.parquet").read_bytes() == before


def test_an_ablation_on_s3_gives_the_same_numbers(
    ardiff: Callable[..., Result], cluster: None, finished: Path, s3_bucket: str
) -> None:
    output = f"{s3_bucket}/ablation"
    ardiff("ablate", *arguments(output, VARIANTS[:1])).expect(0)
    frame = pd.read_parquet(io.BytesIO(storage.read_bytes(f"{output}/results.parquet")))
    local = pd.read_parquet(finished / "results.parquet")
    columns = ["seed", "ar_step", "distance", "frame_identity", "psnr"]
    pd.testing.assert_frame_equal(
        frame[columns], local.loc[local["variant"] == "both", columns].reset_index(drop=True), check_exact=True
    )
    assert "| attention | `both` |" in storage.read_bytes(f"{output}/ablation.md").decode()
    assert storage.read_bytes(f"{output}/ablation.png").startswith(b"\x89PNG")


def test_a_killed_ablation_ends_with_the_same_numbers(
    jobs: Jobs, ardiff: Callable[..., Result], cluster: None, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = jobs.start("ablate", *arguments(folder, VARIANTS[:1]))
    dit = folder / "both" / "seed-1" / "dit"
    wait_for_checkpoint(dit, process)
    assert jobs.kill(process).code == -9
    assert not (dit / "stage.json").exists(), "the unit ended before it could be killed: raise num_steps"
    assert jobs.left_over() == []
    err = ardiff("ablate", *arguments(folder, VARIANTS[:1])).expect(0)
    assert len(re.findall(r"✓ train-dit: done before", err)) == 1
    assert re.search(r"resuming from the checkpoint of step \d+", err)
    columns = ["variant", "seed", "ar_step", "distance", "frame_identity", "psnr"]
    whole, resumed = (pd.read_parquet(run / "results.parquet")[columns] for run in (finished, folder))
    whole = whole[whole["variant"] != "broken"].reset_index(drop=True)
    pd.testing.assert_frame_equal(whole, resumed, check_exact=True)
