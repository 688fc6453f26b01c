"""What is sent to a cluster, and what is refused before anything is."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import requests
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

from ardiff.cli import main, read_arguments
from ardiff.errors import ArdiffError
from ray_jobs.runtime.job_client import connection, job_details
from ray_jobs.submit import plan

ROOT = Path(__file__).parents[2]


def carried(folder: Path, excludes: list[str]) -> set[str]:
    """The files that Ray packs."""
    found: set[Path] = set()
    _dir_travel(folder, [_get_excludes(folder, excludes)], found.add, include_gitignore=True)
    return {str(path.relative_to(folder)) for path in found if path.is_file()}


def test_a_job_gets_code_and_configurations_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ["ardiff/data/storage.py", "ray_jobs/training/job.py", "configs/sky/prepare.yaml", "mine/own.yaml"]
    kept += ["mine/shared.yaml"]
    left = [".env", ".git/config", ".venv/lib/x.py", "runs/dit/model", "data/a.mp4", "ardiff/__pycache__/x.pyc"]
    left += ["mine/video.mp4", "notes.txt"]
    for name in [*kept, *left]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if not name.endswith("yaml") else "num_videos: 3")
    (tmp_path / "mine" / "own.yaml").write_text("base: shared.yaml")
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", "mine/own.yaml", "output=s3://runs/videos", "class_label=1"]
    sent = plan("generate", arguments, read_arguments("generate", arguments), tmp_path, ["NCCL_DEBUG=INFO"])
    assert carried(tmp_path, sent.runtime_env["excludes"]) == set(kept)
    assert sent.entrypoint == f"python -m ray_jobs.generate {' '.join(arguments)}"
    assert sent.runtime_env["env_vars"]["NCCL_DEBUG"] == "INFO"
    assert sent.metadata["output"] == "s3://runs/videos"
    assert re.fullmatch("[0-9a-f]{16}", sent.metadata["fingerprint"])
    assert sent.metadata["commit"] == sent.runtime_env["env_vars"]["ARDIFF_COMMIT"]


def test_a_plain_submission_leaves_data_and_runs_behind(tmp_path: Path) -> None:
    """`ray job submit --working-dir .` of a checkout."""
    shutil.copy(ROOT / ".rayignore", tmp_path)
    kept = ["ardiff/data/storage.py", "ray_jobs/training/job.py", "configs/sky/prepare.yaml", "README.md"]
    for name in [*kept, "data/train/a.mp4", "runs/dit/model", "docs/images/a.png", "tests/a.py", "benchmarks/a.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert carried(tmp_path, []) == {*kept, ".rayignore"}


def test_a_driver_may_reserve_cpus(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--driver-cpus", "1.5", "--dry-run", "evaluate", "fake=[s3://a]", "output=s3://b"]
    assert main(["submit", *arguments]) == 0
    assert "driver: reserves 1.5 CPUs\n" in capsys.readouterr().out
    assert main(["submit", "--driver-cpus=-1", *arguments[2:]]) == 2
    assert "--driver-cpus -1: give a number of CPUs" in capsys.readouterr().err


def test_arguments_reach_the_job_as_they_were_given() -> None:
    arguments = ["fake=[s3://a b/manifest.parquet, s3://c]", "output=s3://runs/$HOME;ls"]
    sent = plan("evaluate", arguments, read_arguments("evaluate", arguments), ROOT, [])
    assert sent.entrypoint.endswith("'fake=[s3://a b/manifest.parquet, s3://c]' 'output=s3://runs/$HOME;ls'")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["generate"], "output=runs/videos would be in a temporary folder"),
        (["generate", "output=s3://a/b", "num_videoss=1"], "num_videos"),
        (["--env", "AWS_SECRET_ACCESS_KEY=x", "generate", "output=/a"], "the dashboard would show it"),
        (["--env", "=x", "generate", "output=/a"], "NAME=VALUE"),
        (["generate", "output=/a", "--config", str(ROOT / "configs" / "sky" / "generate.yaml")], "relative to"),
        (["--working-dir", "nowhere", "generate", "output=/a"], "There is no folder"),
        (["--address", "127.0.0.1:8265", "generate", "output=/a"], "is not the URL"),
        (["--address", "http://127.0.0.1:9", "generate", "output=/a"], "no cluster at http://127.0.0.1:9"),
        (["--token-file", str(ROOT / "README.md"), "generate", "output=/a"], "should be one word"),
        (["--token-file", "nowhere", "generate", "output=/a"], "does not exist"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.chdir(ROOT)
    assert main(["submit", *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert complaint in error
    assert len(error.splitlines()) == 1


def test_a_dry_run_sends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--address", "http://127.0.0.1:9", "--dry-run", "prepare", "output=s3://a/b"]) == 0
    out = capsys.readouterr().out
    assert "entrypoint: python -m ray_jobs.prepare output=s3://a/b" in out
    assert "job=prepare" in out


def test_an_ablation_is_sent_with_its_variants_and_recipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    file = "configs/quickstart/ablation.yaml"
    assert main(["submit", "--dry-run", "ablate", file, "output=s3://a/b"]) == 0
    assert f"entrypoint: python -m ray_jobs.ablate {file} output=s3://a/b" in capsys.readouterr().out
    sent = plan("ablate", [file, "output=s3://a/b"], read_arguments("ablate", [file, "output=s3://a/b"]), ROOT, [])
    assert {file, "configs/quickstart/train_dit.yaml"} <= carried(ROOT, sent.runtime_env["excludes"])


def test_only_jobs_can_be_submitted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["submit", "estimate"])
    assert "train-dit" in capsys.readouterr().err


def refusal(status: int) -> RuntimeError:
    """How Ray's client says so."""
    return RuntimeError(f"Request failed with status code {status}: no.")


class Client:
    """Of a cluster that gives these answers, one after the other."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def get_job_info(self, job: str) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_cluster_that_cannot_answer_now_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    client: Any = Client(refusal(503), requests.ConnectionError("gone"), refusal(500), "details")
    assert job_details(client, "job") == "details"
    client = Client(refusal(404))
    with pytest.raises(ArdiffError, match="job was lost with the head of the cluster: submit the same command"):
        job_details(client, "job")
    client = Client(ValueError("a bug"), refusal(400))
    with pytest.raises(ValueError, match="a bug"):
        job_details(client, "job")
    with pytest.raises(RuntimeError, match="400"):
        job_details(client, "job")


def test_an_address_that_answers_with_an_error_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_jobs.runtime.job_client.JobSubmissionClient", lambda *arguments, **options: None)
    with pytest.raises(ArdiffError, match="answers with status 502"), connection("http://127.0.0.1:9", None):
        raise refusal(502)
