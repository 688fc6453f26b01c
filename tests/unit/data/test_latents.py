from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ardiff.data.latents import (
    DESCRIPTION,
    LatentSet,
    LatentStatistics,
    latent_table,
    read_description,
    read_latents,
    write_description,
)
from ardiff.errors import DataError

SHAPE = (4, 2, 3)


def columns(rows: int) -> dict[str, Any]:
    latents = np.random.default_rng(0).normal(size=(rows, *SHAPE)).astype(np.float32)
    return {"latents": latents, "label": np.arange(rows)}


@pytest.mark.parametrize("rows", [1, 7])
def test_latents_round_trip_through_parquet(tmp_path: Path, rows: int) -> None:
    place, data = str(tmp_path / "a.parquet"), columns(rows)
    pq.write_table(latent_table(data), place, row_group_size=3)
    latents, labels = read_latents(place, SHAPE)
    assert latents.dtype == np.float32
    assert labels.dtype == np.int64
    assert np.array_equal(latents, data["latents"])
    assert np.array_equal(labels, data["label"])


def test_tables_keep_other_columns_and_cut_slices_right(tmp_path: Path) -> None:
    data = columns(6)
    table = latent_table({**data, "uri": np.array([f"v{i}" for i in range(6)])})
    assert table.column_names == ["latents", "label", "uri"]
    pq.write_table(table.slice(2, 3), tmp_path / "part.parquet")
    latents, labels = read_latents(str(tmp_path / "part.parquet"), SHAPE)
    assert labels.tolist() == [2, 3, 4]
    assert np.array_equal(latents, data["latents"][2:5])


def test_arrays_of_other_layouts_and_types_are_stored_as_they_look(tmp_path: Path) -> None:
    latents = np.asfortranarray(columns(3)["latents"].astype(np.float64))
    pq.write_table(latent_table({"latents": latents, "label": np.arange(3)}), tmp_path / "a.parquet")
    assert np.array_equal(read_latents(str(tmp_path / "a.parquet"), SHAPE)[0], latents.astype(np.float32))


@pytest.mark.parametrize("shape", [(4, 2, 4), (5, 2, 3), (2, 2, 3)])
def test_latents_of_another_size_are_refused(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    pq.write_table(latent_table(columns(6)), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet"):
        read_latents(str(tmp_path / "a.parquet"), shape)


def test_other_tables_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": ["a"], "label": [0]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet"):
        read_latents(str(tmp_path / "a.parquet"), SHAPE)


def description() -> LatentSet:
    statistics = LatentStatistics([[0.5, 1.0, -1.0], [0.0, 0.25, 2.0]], 0.7)
    return LatentSet("abc", *SHAPE, ["disc", "ring"], ["train/0.parquet"], [6], statistics, "s3://bucket/vae")


def test_description_round_trip(tmp_path: Path) -> None:
    write_description(str(tmp_path / "set"), description())
    assert read_description(str(tmp_path / "set")) == description()


def test_an_unfinished_set_is_none(tmp_path: Path) -> None:
    (tmp_path / "0.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"No complete set of latents .*ardiff encode"):
        read_description(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"statistics": 1}'])
def test_a_damaged_description_is_a_data_error(tmp_path: Path, text: str) -> None:
    (tmp_path / DESCRIPTION).write_text(text)
    with pytest.raises(DataError, match=r"latents\.json"):
        read_description(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalisation(dtype: torch.dtype) -> None:
    statistics = description().statistics
    latents = torch.randn(5, *SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(0))
    normal = statistics.normalise(latents)
    assert normal.dtype == dtype
    expected = (latents[2, 1, 0, 2] + 1.0) / 0.7
    assert float(normal[2, 1, 0, 2]) == pytest.approx(float(expected), rel=1e-6)
    assert torch.allclose(statistics.denormalise(normal), latents, rtol=1e-5, atol=1e-6)
