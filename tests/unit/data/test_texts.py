"""Stored texts: what is written is found by the URI of a video, one file at a time, and one caption is drawn."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ardiff.data import storage, texts
from ardiff.data.latents import latent_files, latent_table
from ardiff.data.streams import LatentStream
from ardiff.data.texts import (
    StoredCaption,
    TextIndex,
    TextSet,
    UsedEncoder,
    find_texts,
    read_index,
    read_texts,
    shard_bounds,
    stored_captions,
    text_folder,
    write_text_shard,
    write_texts,
)
from ardiff.errors import ConfigError, DataError
from ardiff.randomness import numpy_generator

ENCODER = UsedEncoder(uri="somewhere", fingerprint="0123456789abcdef", dim=3, max_tokens=9, dtype="float32")
CAPTIONS = {"b.mp4": ("two words", "é"), "a.mp4": ("one",), "é.mp4": ("one", "three words here", "two words")}


def states_of(caption: str) -> np.ndarray:
    """A row per word, which tells caption and word apart."""
    words = caption.split()
    return np.array([[len(caption), number, 0.5] for number in range(len(words))], np.float16)


def write(latents: Path, captions: dict[str, tuple[str, ...]], files: list[list[str]]) -> tuple[str, TextSet]:
    folder = text_folder(str(latents), ENCODER.fingerprint)
    for names in files:
        write_text_shard(folder, names, [states_of(name) for name in names], "float32")
    return folder, write_texts(folder, ENCODER, captions, stored_captions(folder, "float32"))


FILES = [["two words", "never used"], ["three words here", "one", "é"]]


def test_token_states_are_found_by_video(tmp_path: Path) -> None:
    folder, description = write(tmp_path, CAPTIONS, FILES)
    assert read_texts(folder) == description
    assert (description.encoder, description.longest, len(description.files)) == (ENCODER, 3, 2)
    index = TextIndex.open(folder, description)
    videos = ["a.mp4", "é.mp4", "none.mp4", "b.mp4", "é.mp4"]
    chosen = index.choose(videos, np.array([0.9, 0.0, 0.5, 0.99999, 0.5]))
    states, mask = index.load(chosen)
    assert (states.shape, states.dtype, mask.shape) == ((5, 3, 3), np.float16, (5, 3))
    for row, caption in enumerate(["one", "one", "", "é", "three words here"]):
        count = len(caption.split())
        assert mask[row].tolist() == [True] * count + [False] * (3 - count)
        assert np.array_equal(states[row][:count], states_of(caption).reshape(-1, 3))
        assert not states[row][count:].any()
    assert [len(v) for v in index.load(np.array([], np.int64))] == [0, 0]


def test_all_captions_of_a_video_are_drawn_equally(tmp_path: Path) -> None:
    index = TextIndex.open(*write(tmp_path, CAPTIONS, FILES))
    chosen = index.choose(["é.mp4"] * 3000, numpy_generator("test", 0).random(3000))
    assert len(set(chosen.tolist())) == 3
    assert min(Counter(chosen.tolist()).values()) > 900


def test_stored_captions_survive_without_a_description(tmp_path: Path) -> None:
    folder, description = write(tmp_path, CAPTIONS, FILES)
    storage.delete_file(f"{folder}/texts.json")
    stored = stored_captions(folder, "float32")
    assert set(stored) == {caption for file in FILES for caption in file}
    assert stored["é"] == StoredCaption(stored["one"].file, 2, 1)
    with pytest.raises(DataError, match="Cannot read"):
        read_texts(folder)
    assert stored_captions(f"{tmp_path}/nothing", "float32") == {}
    again, changed = write(tmp_path, {**CAPTIONS, "a.mp4": ("é",)}, [])
    assert (again, changed.files) == (folder, description.files)
    assert changed.content != description.content
    assert changed.index != description.index
    assert [name for name in storage.list_files(folder) if "/captions-" in name] == [f"{folder}/{changed.index}"]
    assert read_index(folder, changed)["uri"].to_pylist().count("é.mp4") == 3


def test_the_texts_are_found_beside_the_latents(tmp_path: Path) -> None:
    (tmp_path / "part-0.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"There are no texts in .*: run `ardiff encode` with text\.encoder"):
        find_texts(str(tmp_path))
    folder, _ = write(tmp_path, CAPTIONS, FILES)
    assert find_texts(f"{tmp_path}/") == find_texts(str(tmp_path), ENCODER.fingerprint) == folder
    assert latent_files(f"{tmp_path}/") == [f"{tmp_path}/part-0.parquet"]
    with pytest.raises(ConfigError, match=r"no texts by the encoder abc .*, only by 0123456789abcdef"):
        find_texts(str(tmp_path), "abc")
    (tmp_path / "text-ff").mkdir()
    (tmp_path / "text-ff" / "texts.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"several encoders: set data\.text_encoder to one of 0123456789abcdef, ff"):
        find_texts(str(tmp_path))
    with pytest.raises(DataError, match="does not describe a set of texts"):
        read_texts(find_texts(str(tmp_path), "ff"))


def test_files_have_consecutive_captions_and_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "SHARD_BYTES", 100)
    monkeypatch.setattr(texts, "SHARD_CAPTIONS", 4)
    assert shard_bounds([], 5) == [0]
    assert shard_bounds([5, 4, 2, 20, 1], 5) == [0, 2, 3, 4, 5]  # 50 + 40, 20, 200, 10 bytes
    assert shard_bounds([1] * 9, 5) == [0, 4, 8, 9]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder, description = write(tmp_path, CAPTIONS, FILES)
    Path(folder, description.files[0]).write_bytes(b"PAR1")
    index = TextIndex.open(folder, description)
    with pytest.raises(DataError, match=rf"Cannot read the texts .*{description.files[0]}"):
        index.load(np.arange(6))
    with pytest.raises(DataError, match=rf"captions of .*{description.files[0]} .*delete it to encode them again"):
        stored_captions(folder, "float32")


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> LatentStream:
    """Eight clips in two files; the label numbers the videos, of which one has no caption."""
    folder, shape = tmp_path_factory.mktemp("latents"), (2, 1, 2)
    videos, files = [*CAPTIONS, "none.mp4"], []
    for number in range(2):
        files.append(str(folder / f"{number}.parquet"))
        columns = {"uri": videos, "label": np.arange(4), "latents": np.zeros((4, *shape), np.float32)}
        pq.write_table(latent_table(columns), files[-1])
    index = TextIndex.open(*write(folder, CAPTIONS, FILES))
    return LatentStream(files, [4, 4], shape, seed=0, files_per_chunk=1, texts=index)


def words(samples: dict[str, np.ndarray]) -> list[tuple[int, int, int]]:
    """Label, number of tokens and first value of each sample."""
    counts = samples["text_mask"].sum(axis=1)
    return list(zip(samples["label"].tolist(), counts.tolist(), samples["text"][:, 0, 0].tolist(), strict=True))


def test_a_clip_has_a_caption_of_its_video(stream: LatentStream) -> None:
    drawn: dict[int, set[tuple[int, int]]] = {}
    for chunk in range(60):
        samples = stream.load(chunk)
        assert samples["text"].shape == (4, 3, 3)
        for label, count, value in words(samples):
            drawn.setdefault(label, set()).add((count, value))
    expected = [{(len(c.split()), len(c)) for c in captions} for captions in CAPTIONS.values()]
    assert drawn == dict(enumerate([*expected, {(0, 0)}]))
    assert stream.chunk_bytes == 4 * (2 * 1 * 2 * 4 + 3 * 3 * 2)


def test_the_caption_depends_on_the_position_only(stream: LatentStream) -> None:
    for chunk in (0, 5):
        whole = words(stream.load(chunk))
        for rows in ([2], [1, 3], [0, 1, 2, 3]):
            assert words(stream.load(chunk, np.array(rows))) == [whole[row] for row in rows]
    assert [words(stream.load(chunk)) for chunk in range(8)] != [words(stream.load(chunk + 2)) for chunk in range(8)]


def test_captions_of_another_precision_are_not_taken_for_stored_ones(tmp_path: Path) -> None:
    write_text_shard(str(tmp_path), ["one"], [states_of("one")], "float32")
    assert set(stored_captions(str(tmp_path), "float32")) == {"one"}
    assert stored_captions(str(tmp_path), "bfloat16") == {}
