"""``prepare`` with filters, from files to latents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken_videos import encode as encode_file
from filtered_videos import hdr, interlaced
from jobs import Result

from ardiff.data.latents import latent_files, read_keys
from ardiff.data.manifest import read_manifest
from ardiff.pretrained import save_autoencoder

pytestmark = pytest.mark.ray


def test_filters_are_in_the_manifest_and_replace_latents(
    ardiff: Callable[..., Result], cluster: None, make_vae: Any, tmp_path: Path
) -> None:
    """Only the clips of videos whose filters change are encoded again; the others stay as they are."""
    source = tmp_path / "videos"
    (source / "train").mkdir(parents=True)
    (source / "test").mkdir()
    (source / "test" / "other.mp4").write_bytes(encode_file())
    greys = np.linspace(0.2, 0.6, 40)[:, None].repeat(3, 1)
    files = {"interlaced.mp4": interlaced(), "hdr.mkv": hdr(greys, 16), "plain.mp4": encode_file()}
    for name, data in files.items():
        (source / "train" / name).write_bytes(data)
    save_autoencoder(str(tmp_path / "vae"), make_vae())
    encode = ["encode", f"manifest={tmp_path}/data/manifest.parquet", f"vae={tmp_path}/vae"]
    encode += [f"output={tmp_path}/latents", "num_frames=2", "clip_step=4"]

    def run(*options: str) -> tuple[str, dict[str, str], dict[str, set[str]]]:
        outcome = ardiff("prepare", source, tmp_path / "data", "sheet_clips=2", *options)
        assert outcome.code == 0, outcome.err
        filters = {Path(r.uri).stem: r.filters for r in read_manifest(f"{tmp_path}/data/manifest.parquet")}
        encoded = ardiff(*encode)
        assert encoded.code == 0, encoded.err
        [folder] = [path for path in (tmp_path / "latents").iterdir() if path.is_dir()]
        etags: dict[str, set[str]] = {}
        for key in [key for file in latent_files(str(folder)) for key in read_keys(file)]:
            etags.setdefault(Path(key.uri).stem, set()).add(key.etag)
        return " ".join((outcome.err + encoded.err).split()), filters, etags

    text, filters, before = run()
    assert filters == {"hdr": "", "interlaced": "", "plain": "", "other": ""}
    assert "tone_map=auto" in text
    assert "deinterlace=auto" in text
    text, filters, after = run("--deinterlace", "auto", "tone_map=auto")
    assert filters == {"hdr": "tone_map", "interlaced": "deinterlace", "plain": "", "other": ""}
    assert "0 videos are new or changed, 4 are known" in text
    assert after["plain"] == before["plain"]
    for name in ("hdr", "interlaced"):
        assert len(after[name]) == 1
        assert after[name].isdisjoint(before[name])
    assert run()[1:] == ({"hdr": "", "interlaced": "", "plain": "", "other": ""}, before)
