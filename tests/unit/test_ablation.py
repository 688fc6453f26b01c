"""What an ablation makes of its numbers: intervals over seeds, tables, a picture; and how it plans its units."""

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from ardiff.cli import main
from ardiff.config import load_config, to_yaml
from ardiff.data import s3, storage
from ardiff.data.config import STORAGE_VARIABLE
from ardiff.errors import ConfigError
from ardiff.metrics.seeds import estimate_mean
from ray_jobs.ablate import AblateConfig, describe_plan, make_plan
from ray_jobs.quickstart import QuickstartConfig
from ray_jobs.reports.ablation import (
    BEGIN,
    END,
    Result,
    Variant,
    draw,
    insert_tables,
    ratio,
    tables,
    write_results,
)
from ray_jobs.runtime.stages import StageRecord

SHIPPED = Path(__file__).parents[2] / "configs" / "quickstart" / "ablation.yaml"
VARIANTS = (Variant(name="base", question="recipe"), Variant(name="other", question="law", settings=("a=1",)))


def result(variant: str, seed: int, distance: float | None, ar_step: int = 5, **more: Any) -> Result:
    return Result(variant=variant, seed=seed, ar_step=ar_step, distance=distance, **more)


def test_the_interval_over_seeds_is_students() -> None:
    values = [3.0, 5.0, 10.0]
    found = estimate_mean(values)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((6.0, low, high))
    assert found.count == 3
    # Two seeds: the quantile is 12.706, the standard error half their difference.
    assert estimate_mean([1.0, 3.0]).high == pytest.approx(2 + 12.7062, abs=1e-3)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    found = [estimate_mean(generator.normal(2.0, 3.0, size=3).tolist()) for _ in range(2000)]
    assert 0.935 < np.mean([f.low <= 2.0 <= f.high for f in found]) < 0.965


def test_the_mean_of_logarithms_is_geometric_and_positive() -> None:
    found = estimate_mean([1.0, 100.0], log=True)
    assert found.mean == pytest.approx(10.0)
    assert 0 < found.low < 1
    assert found.low * found.high == pytest.approx(100.0)  # symmetric in factors


def test_one_seed_has_no_interval() -> None:
    found = estimate_mean([4.0])
    assert (found.mean, found.low, found.high) == (4.0, -np.inf, np.inf)
    for values in ([], [0.0, 1.0]):
        with pytest.raises(ValueError, match="at least one value"):
            estimate_mean(values, log=True)


def test_pairs_cancel_what_a_seed_does_to_both() -> None:
    results = [result("base", s, d) for s, d in enumerate((10.0, 40.0, 90.0))]
    results += [result("other", s, 2 * d) for s, d in ((0, 10.0), (2, 90.0))]
    found = ratio(results, "other", "base", 5)
    assert found is not None
    assert (found.mean, found.low, found.high, found.count) == (pytest.approx(2.0),) * 3 + (2,)
    assert ratio(results, "other", "base", 0) is None
    assert ratio(results, "nobody", "base", 5) is None


def test_tables_say_what_was_measured_and_what_failed() -> None:
    results = [
        result("base", seed, distance, step, frame_identity=0.5 + seed / 10, real=6.0, reconstruction=20.0)
        for seed, distance in enumerate((10.0, 11.0, 12.0))
        for step in (0, 5)
    ]
    results += [result("other", seed, 10 * (10.0 + seed), 5, frame_identity=0.25) for seed in range(3)]
    results += [result("other", 0, None, 0, reason="it broke")]
    text = tables(VARIANTS, results, ["a budget", "some seeds"])
    assert text.startswith("- a budget\n- some seeds\n")
    assert "Real clips reach 6.0, their reconstructions 20.0." in text
    assert text.count("| question | variant | `ar_step` 0 | `ar_step` 5 |") == 3
    assert "| law | `other` | - | **10.00 [10.00, 10.00]** |" in text
    assert "| recipe | `base` | 60 [35, 85] | 60 [35, 85] |" in text
    assert "| law | `other` | failed | 25 [25, 25] |" in text
    assert text.rstrip().endswith("- `other`, seed 0: it broke")


def test_only_intervals_without_1_are_bold() -> None:
    results = [result("base", s, 10.0) for s in range(3)]
    results += [result("other", s, d) for s, d in enumerate((8.0, 10.0, 13.0))]
    assert "**" not in tables(VARIANTS, results, []).split("| law |")[2].splitlines()[0]


def test_text_around_the_tables_is_kept() -> None:
    fresh = insert_tables("# Title\n", "one")
    assert fresh == f"# Title\n\n{BEGIN}\n\none\n{END}\n"
    written = fresh.replace("# Title\n", "# Title\n\nBefore.\n") + "\nAfter.\n"
    again = insert_tables(written, "two")
    assert again == written.replace("one", "two")


def test_results_are_files_and_a_picture(tmp_path: Path) -> None:
    results = [result("base", s, 10.0 + s, frame_identity=0.9, real=6.0) for s in range(2)]
    results += [result("other", 0, 900.0, frame_identity=0.1), result("other", 1, None, reason="it broke")]
    write_results(str(tmp_path), VARIANTS, results, {"units": 4})
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["about"] == {"units": 4}
    assert [r["reason"] for r in content["results"]] == ["", "", "", "it broke"]
    frame = pd.read_parquet(tmp_path / "results.parquet")
    assert frame["distance"].tolist()[:3] == [10.0, 11.0, 900.0]
    assert np.isnan(frame["distance"][3])
    with Image.open(io.BytesIO((tmp_path / "ablation.png").read_bytes())) as picture:
        assert picture.width > 600
        assert len(picture.getcolors(1 << 24) or []) > 10
    assert draw(VARIANTS, [r for r in results if r.reason])  # nothing to draw is no error


def test_the_shipped_plan_is_table_3() -> None:
    assert main(["ablate", str(SHIPPED), "--dry-run"]) == 0
    config = load_config(AblateConfig, [_without_command(SHIPPED)])
    units = make_plan(config)
    assert len(units) == len(config.variants) * len(config.seeds)
    assert [u.variant for u in units[: len(config.variants)]] == list(config.names)
    of = {u.variant: u.config for u in units if u.seed == 1}
    laws = {c.train_dit.diffusion.timestep_sampling for c in of.values()}
    assert laws == {"fopp", "uniform_from_first", "independent", "synchronous"}
    assert {c.train_dit.diffusion.prediction for c in of.values()} == {"x0", "eps", "v"}
    assert {c.train_dit.dit.attention for c in of.values()} == {"causal", "bidirectional"}
    assert of["bidirectional"].generate.mode == "full"
    assert of["no_temporal_decoder"].train_vae.vae.temporal == "none"
    assert len({c.train_dit.train.num_steps for c in of.values()}) == 1
    assert {c.samples.ar_steps for c in of.values()} == {config.ar_steps}
    assert {c.train_dit.train.seed for c in of.values()} == {1}
    assert len({u.config.generate.seed for u in units}) == len(config.seeds)
    # One AR-VAE for all but the variant that changes it.
    places = {u.variant: u.shared for u in units}
    assert len(set(places.values())) == 2
    assert [v for v, place in places.items() if place != places["fopp"]] == ["no_temporal_decoder"]
    assert "24 units of 8 variants and 3 seeds" in describe_plan(config)


def test_a_plan_in_a_bucket_is_looked_up_where_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for name in (STORAGE_VARIABLE, "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, "{}")  # so that what --dry-run sets is undone

    def exists(place: str) -> bool:
        asked.append((place, s3.current().endpoint))
        return False

    monkeypatch.setattr(storage, "exists", exists)
    where = ["output=s3://runs/ablation", "storage.endpoint=http://host:1"]
    assert main(["ablate", str(SHIPPED), *where, "--dry-run"]) == 0
    assert ("s3://runs/ablation/fopp/seed-0/scores/stage.json", "http://host:1") in asked


def _without_command(file: Path) -> Path:
    """The file's settings, as the command sees them."""
    copy = Path(file.name)
    copy.write_text(file.read_text().replace("command: ablate\n", ""))
    return copy


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_quickstart_gives_its_latents_its_recipe_and_its_pace(tmp_path: Path) -> None:
    quickstart = load_config(
        QuickstartConfig, [SHIPPED.parent], ["train_dit.train.num_steps=1000", "train_dit.dit.depth=2"]
    )
    for stage, seconds in {"data": 1, "vae": 1, "latents": 1, "dit": 3600, "samples": 0, "scores": 0}.items():
        (tmp_path / "q" / stage).mkdir(parents=True)
        record = StageRecord(stage, "", seconds, 1.0, "", {})
        (tmp_path / "q" / stage / "stage.json").write_text(json.dumps(asdict(record)))
    (tmp_path / "q" / "config.yaml").write_text(to_yaml(quickstart))
    settings = ["quickstart=q", "settings=[train_dit.train.num_steps=500]", "seeds=[0, 1]"]
    config = load_config(AblateConfig, [_without_command(SHIPPED)], settings)
    units = make_plan(config)
    assert {u.variant for u in units if u.shared != "q"} == {"no_temporal_decoder"}
    assert {u.config.train_dit.dit.depth for u in units} == {2}
    # 16 units of half of the steps that took an hour.
    assert describe_plan(config).endswith("about 8.0 hours at the speed of q")
    (tmp_path / "runs" / "ablation" / "fopp" / "seed-0" / "scores").mkdir(parents=True)
    done = tmp_path / "runs" / "ablation" / "fopp" / "seed-0" / "scores" / "stage.json"
    done.write_text(json.dumps(asdict(StageRecord("evaluate", "", 1.0, 1.0, "", {}))))
    assert "remaining: 15 units, 7,500 training steps" in describe_plan(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["seeds=[1]"], "at least 2 seeds"),
        (["seeds=[1, 1]"], "seeds must not contain 1 twice"),
        (["variants=[{name: a}, {name: a}]"], "variants must not contain a twice"),
        (["variants=[{name: a/b}]"], "it becomes a folder"),
        (["variants=[{name: a, settings: [train_dit.dit.widht=3]}]"], "variant a: Unknown configuration key"),
        (["variants=[{name: a}, {name: b, settings: [train_dit.train.num_steps=9]}]"], "compares on one budget"),
        (["variants=[{name: a}]", "ar_steps=[99]"], "ar_step must be between 0 and"),
        (["variants=[]"], "There are no variants"),
        (["variants=[{name: a}]", "quickstart=nowhere"], "has no complete stage 'data'"),
    ],
)
def test_impossible_plans(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        make_plan(load_config(AblateConfig, None, settings))


def test_a_file_of_another_verb_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--config", str(SHIPPED), "--dry-run"]) == 2
    assert "is a configuration of `ardiff ablate`, not of `ardiff quickstart`" in capsys.readouterr().err
