"""The model card of a pipeline: its ``README.md``, written from the files of the run that trained it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from ardiff.data import storage
from ardiff.data.latents import DESCRIPTION, read_description
from ardiff.errors import DataError
from ardiff.resolution import Resolution

CARD, SHEET = "README.md", "sheet.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """What a model card says beside the configuration of the model."""

    license: str = ""
    """Identifier of the license of the weights, such as ``apache-2.0``. Empty: none is granted."""
    intended_use: str = (
        "Research on video generation. The model shows what its training data shows, with the biases of that data. "
        "Do not present its videos as recordings of real events."
    )
    """What the model is for, and what it is not for."""
    data: str = ""
    """The training data in words: source, content, license, consent of the people in it."""
    run: str = ""
    """Folder of the training run, local or ``s3://``: its configuration, its versions and its last samples."""
    scores: tuple[str, ...] = ()
    """Folders or files that ``ardiff evaluate`` wrote: ``scores.json``."""
    sheet: str = ""
    """PNG with generated videos. Empty takes the last samples of the run."""


def write_card(folder: str, name: str, config: dict[str, Any], card: ModelCard) -> None:
    """Writes the card of a pipeline, and its sheet, into the pipeline's folder.

    Args:
        folder: Folder of the pipeline, local or ``s3://``.
        name: Name of the model, such as ``org/name``.
        config: Content of the pipeline's ``config.json``.
        card: What the card says.

    Raises:
        DataError: A file that ``card`` names is missing or damaged.
    """
    if (sheet := card.sheet or _last_samples(card.run)) is not None:
        storage.write_bytes(storage.join(folder, SHEET), storage.read_bytes(sheet))
    text = "\n".join(_lines(name, config, card, has_sheet=sheet is not None))
    storage.write_bytes(storage.join(folder, CARD), text.encode())


def _lines(name: str, config: dict[str, Any], card: ModelCard, has_sheet: bool) -> Iterator[str]:
    tags = ["video-generation", "ar-diffusion"]
    header = {"license": card.license or "other", "library_name": "ardiff", "tags": tags}
    yield from ("---", yaml.safe_dump(header, sort_keys=False).strip(), "---", "", f"# {name}", "")
    dit, vae = config["dit"], config["vae"]
    shapes = [Resolution.parse(shape) for shape in (vae["resolution"], *vae.get("buckets", []))]
    yield "A pipeline of ardiff, which is AR-Diffusion (asynchronous video generation with auto-regressive diffusion)."
    sizes, classes = " or ".join(f"{s.width} x {s.height}" for s in shapes), _classes(config["class_names"])
    yield f"It makes videos of {sizes} pixels {classes}, and was trained on clips of"
    yield f"{dit['num_frames']} frames."
    yield from (
        "",
        "```python",
        "from ardiff.pipeline import ARDiffusionPipeline",
        "",
        f'pipeline = ARDiffusionPipeline.from_pretrained("{name}", local_files_only=False)',
        f'[video] = pipeline(num_frames={dit["num_frames"]}, seed=1, output_type="mp4").frames',
        "```",
    )
    if has_sheet:
        yield from ("", f"![Generated videos]({SHEET})")
    yield from ("", "## Intended use", "", card.intended_use)
    yield from ("", "## License", "", f"The weights: {card.license}." if card.license else "No license is granted.")
    run = _read_yaml(storage.join(card.run, "config.yaml")) if card.run else {}
    yield from ("", "## Training data", "", card.data or "Not described.", "", f"Fingerprint: {_data(run)}.")
    yield from ("", "## Scores", "", *_scores(card.scores))
    yield from ("", "## Configuration", "")
    if card.run:
        versions = _read_json(storage.join(card.run, "versions.json"))
        yield from ("Trained with " + ", ".join(f"{key} {value}" for key, value in versions.items()) + ".", "")
    model = {key: config[key] for key in ("dit", "vae", "diffusion")}
    yield from ("```yaml", yaml.safe_dump(run or model, sort_keys=False).strip(), "```", "")


def _classes(names: list[str]) -> str:
    if not names:
        return "without classes"
    return f"of {len(names)} classes ({', '.join(names[:50])}{', ...' if len(names) > 50 else ''})"


def _data(run: dict[str, Any]) -> str:
    """The fingerprint of the training clips and their order, from the description of the run's latents."""
    if not run.get("latents") or not storage.exists(storage.join(run["latents"], DESCRIPTION)):
        return "unknown"
    latents = read_description(run["latents"])
    return f"clips `{latents.content}`, latents `{latents.fingerprint}`, {sum(latents.rows)} clips"


def _scores(uris: tuple[str, ...]) -> Iterator[str]:
    """A table of scores, each with its interval, its real-vs-real baseline and its protocol."""
    # Here, not at the top: loading a pipeline needs no metric.
    from ardiff.metrics.scores import describe_protocol, format_score, read_scores

    if not uris:
        yield "Not scored."
        return
    yield from ("| videos | metric | score | 95 % interval | real vs real | protocol |", "|---|---|---|---|---|---|")
    for score in (score for uri in uris for score in read_scores(uri)):

        def cell(value: float | None, metric: str = score.metric) -> str:
            return "" if value is None else format_score(metric, value)

        interval = "" if score.low is None else f"{cell(score.low)} to {cell(score.high)}"
        columns = (score.set, score.metric, cell(score.score), interval, cell(score.baseline))
        yield f"| {' | '.join(columns)} | {describe_protocol(score.protocol)} |"


def _last_samples(run: str) -> str | None:
    """The last sheet of samples of a training run."""
    folder = storage.join(run, "samples") if run else ""
    sheets = storage.list_files(folder, (".png",)) if folder and storage.exists(folder) else []
    return sheets[-1] if sheets else None


def _read_json(uri: str) -> dict[str, Any]:
    try:
        return json.loads(storage.read_bytes(uri))
    except ValueError as error:
        raise DataError(f"{uri} is not valid JSON: {error}") from error


def _read_yaml(uri: str) -> dict[str, Any]:
    try:
        return yaml.safe_load(storage.read_bytes(uri))
    except yaml.YAMLError as error:
        raise DataError(f"{uri} is not valid YAML: {error}") from error
