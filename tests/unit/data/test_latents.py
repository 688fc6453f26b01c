from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ardiff.data.latents import (
    DESCRIPTION,
    ClipKey,
    LatentSet,
    LatentStatistics,
    check_vae,
    latent_sums,
    latent_table,
    read_description,
    read_keys,
    read_latents,
    select_rows,
    statistics_of,
    vae_fingerprint,
    write_description,
    write_shard,
)
from ardiff.errors import ConfigError, DataError
from ardiff.pretrained import save_autoencoder

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
    with pytest.raises(DataError, match=r"no complete set of latents .*ardiff encode"):
        read_description(str(tmp_path))


def test_the_folder_of_several_sets_names_one(tmp_path: Path) -> None:
    write_description(str(tmp_path / "0123"), description())
    with pytest.raises(DataError, match=rf"give one of the sets below it, such as {tmp_path}/0123\."):
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


def keys(count: int) -> dict[str, object]:
    return {
        "uri": [f"v{i}" for i in range(count)],
        "etag": ["e"] * count,
        "label": np.arange(count),
        "start": np.arange(count) * 8,
        "mirrored": np.arange(count) % 2 == 1,
        "latents": np.random.default_rng(count).normal(size=(count, 2, 3, 4)).astype(np.float32),
    }


def test_shards_are_named_by_their_clips_and_lose_stale_ones(tmp_path: Path) -> None:
    folder, columns = str(tmp_path), keys(3)
    name = write_shard(folder, columns)
    assert write_shard(folder, {**columns, "latents": columns["latents"] * 2}) == name  # type: ignore[operator]
    assert write_shard(folder, keys(2)) != name
    found = read_keys(f"{folder}/{name}")
    assert found == [ClipKey("v0", "e", 0, False), ClipKey("v1", "e", 8, True), ClipKey("v2", "e", 16, False)]
    rest = select_rows(f"{folder}/{name}", np.array([True, False, True]))
    (tmp_path / "rest.parquet").write_bytes(rest)
    assert read_keys(f"{folder}/rest.parquet") == [found[0], found[2]]
    latents, labels = read_latents(f"{folder}/rest.parquet", (2, 3, 4))
    assert np.array_equal(latents, columns["latents"][[0, 2]] * 2)  # type: ignore[index]
    assert labels.tolist() == [0, 2]
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match="Cannot read the clips"):
        read_keys(f"{folder}/bad.parquet")


def test_statistics_of_parts_are_those_of_the_whole() -> None:
    latents = np.random.default_rng(0).normal(3.0, 2.0, size=(10, 4, 2, 3)).astype(np.float32)
    found = statistics_of([latent_sums(latents[:3]), latent_sums(latents[3:])])
    np.testing.assert_allclose(found.mean, latents.mean(axis=(0, 1)), rtol=1e-6)
    np.testing.assert_allclose(found.std, np.sqrt(latents.astype(np.float64).var(axis=(0, 1)).mean()), rtol=1e-6)


def test_latents_of_another_vae_are_refused(tmp_path: Path, make_vae: Any) -> None:
    places = [str(tmp_path / name) for name in ("a", "b")]
    for seed, place in enumerate(places):
        save_autoencoder(place, make_vae(seed=seed))
    names = [vae_fingerprint(place) for place in places]
    description = LatentSet("x", 2, 3, 4, [], [], [], LatentStatistics([[0.0]], 1.0), places[0], names[0])
    check_vae("set", description, places[0])
    with pytest.raises(ConfigError, match=f"by the AR-VAE {names[0]} .* is the AR-VAE {names[1]}"):
        check_vae("set", description, places[1])
