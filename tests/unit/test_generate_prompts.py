"""Files of prompts of `ardiff generate`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ardiff.errors import ConfigError
from ardiff.sampling.params import validate
from ardiff.sweep.models import SweptModel
from ray_jobs.generate import _claim_output
from ray_jobs.generation import prompts
from ray_jobs.generation.config import GenerateConfig
from ray_jobs.generation.prompts import read_prompts


def test_each_line_is_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red ring\r\n\n  ein grünes Dreieck \n".encode())
    assert read_prompts(str(file)) == ["a red ring", "ein grünes Dreieck"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no file of prompts"), (b" \n\n", "holds no prompt"), (b"a \xff ring", "not UTF-8")],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_prompts(str(file))


def test_a_file_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_BYTES", 8)
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"a red ring")
    with pytest.raises(ConfigError, match="10 bytes"):
        read_prompts(str(file))


def test_more_videos_of_a_file_of_prompts_belong_to_the_same_folder(make_pipeline: Any, tmp_path: Path) -> None:
    make_pipeline(num_classes=0).save_pretrained(str(tmp_path / "pipeline"))
    model = SweptModel.load(str(tmp_path / "pipeline"))
    config = GenerateConfig(pipeline=model.uri, output=str(tmp_path / "videos"), prompts="prompts.txt", num_videos=1)
    first = validate(config.params, model.info)
    _claim_output(config, ["a", "b"], replace(first, prompt="a"), model)
    _claim_output(replace(config, num_videos=3), ["a", "b"], replace(first, prompt="a"), model)
    with pytest.raises(ConfigError, match="other settings"):
        _claim_output(config, ["a", "c"], replace(first, prompt="a"), model)
