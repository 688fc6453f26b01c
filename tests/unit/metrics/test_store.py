"""Features on disk: one id a row, whatever was written how often."""

from pathlib import Path

import numpy as np
import pytest

from ardiff.errors import DataError
from ardiff.metrics.frechet import frechet_distance
from ardiff.metrics.store import ClipFeatures, FeatureStore


def rows(count: int, first: int = 0, width: int = 5, depth: int = 2) -> list[ClipFeatures]:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(first + count, depth, width)).astype(np.float32)
    return [ClipFeatures(i, f"v{i}.mp4", i, f"{i:x}", values[i]) for i in range(first, first + count)]


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_any_number_of_shards_in_any_order_gives_the_same(shards: int, tmp_path: Path) -> None:
    store, all_rows = FeatureStore(str(tmp_path)), rows(20)
    for part in list(np.array_split(np.arange(20), shards))[::-1]:
        store.append([all_rows[i] for i in part])
    stored, clips = store.read(20)
    features = stored.array()
    assert np.array_equal(features, np.stack([r.features for r in all_rows]))
    assert [c.uri for c in clips] == [r.uri for r in all_rows]
    assert store.ids() == set(range(20))
    flat = features.reshape(-1, 5)
    expected = np.concatenate([r.features for r in all_rows])
    assert frechet_distance(flat, flat[::-1] + 1) == frechet_distance(expected, expected[::-1] + 1)


def test_what_is_written_twice_counts_once(tmp_path: Path) -> None:
    store = FeatureStore(str(tmp_path))
    store.append(rows(4))
    store.append(rows(4))  # the same part again
    store.append(rows(3, first=2))  # another part that overlaps
    assert np.array_equal(store.read(5)[0].array(), np.stack([r.features for r in rows(5)]))
    assert len(list(tmp_path.iterdir())) == 2


def test_features_are_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies in which part, and as often as they are gone through."""
    monkeypatch.setattr("ardiff.metrics.store.BLOCK", 4)
    store, all_rows = FeatureStore(str(tmp_path)), rows(10)
    for ids in ((0, 5, 9), (1, 2, 8), (3, 4, 6, 7)):
        store.append([all_rows[i] for i in ids])
    features, clips = store.read(10)
    assert [len(block) for block in features] == [4, 4, 2]
    assert np.array_equal(features.array(), np.stack([r.features for r in all_rows]))
    assert np.array_equal(features[5:7].array(), np.stack([r.features for r in all_rows[5:7]]))
    assert [(c.id, c.uri, c.start, c.sha256) for c in clips] == [(r.id, r.uri, r.start, r.sha256) for r in all_rows]


def test_what_is_missing_or_bad_is_named(tmp_path: Path) -> None:
    store = FeatureStore(str(tmp_path / "features"))
    assert store.ids() == set()
    with pytest.raises(DataError, match="has no features of clip 0"):
        store.read(1)
    bad = rows(3)
    bad[1].features[0, 0] = np.nan
    with pytest.raises(DataError, match=r"features of v1\.mp4 contain NaN"):
        store.append(bad)
    assert not (tmp_path / "features").exists()
    store.append(rows(2))
    store.append(rows(1, first=2, width=4))
    with pytest.raises(DataError, match="different shapes"):
        store.read(3)[0].array()
    with pytest.raises(DataError, match="has no features of clip 3"):
        store.read(4)
    next((tmp_path / "features").iterdir()).write_bytes(b"no parquet")
    with pytest.raises(DataError, match="damaged"):
        store.ids()
