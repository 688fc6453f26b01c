"""Scores from features that were computed elsewhere. Neither videos nor a cluster are needed."""

import hashlib

import numpy as np

from ardiff.data import storage
from ardiff.errors import ArdiffError, DataError
from ardiff.metrics.arrays import read_features
from ardiff.metrics.distances import Kernel, Polynomial, SetDistance
from ardiff.metrics.features import VideoFeatures
from ardiff.metrics.protocol import FROM_FILES, Protocol, ProtocolName
from ardiff.metrics.registry import find_spec
from ardiff.metrics.scores import SetScore
from ardiff.metrics.store import StoredClip
from ardiff.randomness import numpy_generator
from ray_jobs.evaluation.config import EvaluateConfig
from ray_jobs.evaluation.estimates import GeneratedSet, Reference, data_fingerprint, estimate_score
from ray_jobs.evaluation.features import Extracted


def score_features(config: EvaluateConfig) -> list[SetScore]:
    """The Frechet and the kernel distance of every file of features to the real ones.

    As many real rows as generated ones are drawn, and as many others for the baseline if there are enough.

    Raises:
        ArdiffError: A file holds no features, or others than the real ones.
    """
    assert config.real_features is not None
    real = read_features(config.real_features)
    distances = _distances(config.protocol)
    scores: dict[str, list[SetScore]] = {metric: [] for metric in distances}
    for uri in config.features:
        fake = read_features(uri)
        if fake.shape[1:] != real.shape[1:]:
            raise DataError(
                f"{uri} has features of shape {fake.shape[1:]}, {config.real_features} of {real.shape[1:]}: "
                "compute both with the same network."
            )
        for metric, distance in distances.items():
            scores[metric].append(_score(config, metric, distance, real, fake, uri))
    return [score for metric in distances for score in scores[metric]]


def _distances(protocol: ProtocolName) -> dict[str, SetDistance]:
    """The distances of a protocol between features, by metric."""
    match protocol:
        case "jedi":
            return {"jedi": Polynomial()}
        case "cd-fvd":
            return {"frechet": find_spec(protocol, "cd-fvd").distance, "kernel": Kernel()}
        case _:
            return {"frechet": find_spec(protocol, "fvd").distance, "kernel": Kernel()}


def set_name(uri: str) -> str:
    """The name of the set whose features are in the file ``uri``."""
    return uri.rstrip("/").rpartition("/")[2]


def _score(
    config: EvaluateConfig, metric: str, distance: SetDistance, real: np.ndarray, fake: np.ndarray, uri: str
) -> SetScore:
    assert config.real_features is not None
    count = min(len(fake), config.num_clips)
    reference_count = count * (2 if len(real) >= 2 * count else 1)
    chosen_real = _draw(real, reference_count, config.real_features, config.seed)
    chosen_fake = _draw(fake, count, uri, config.seed)
    try:
        reference = Reference.of(count, distance, [(row.uri, 0) for row in chosen_real[1]], chosen_real)
        protocol = Protocol(
            name=config.protocol,
            metric=metric,
            network="none",
            weights="none",
            feature=f"{real.shape[2]} features {FROM_FILES}",
            num_frames=config.num_frames,
            stride=config.stride,
            resolution=FROM_FILES,
            resize=FROM_FILES,
            value_range=FROM_FILES,
            codec_real=FROM_FILES,
            codec_fake=FROM_FILES,
            num_real=len(reference.rows),
            num_fake=count,
            ddof=distance.ddof,
            real_split=FROM_FILES,
            real_data=data_fingerprint(reference.rows),
            choice=f"drawn with seed {config.seed}",
        )
        name = set_name(uri)
        return estimate_score(
            config, distance, protocol, reference, GeneratedSet.of(name, uri, chosen_fake), None, f"{metric} of {name}"
        )
    except ValueError as error:
        raise ArdiffError(f"{metric} of {uri}: {error}.") from error


def _draw(features: np.ndarray, count: int, uri: str, seed: int) -> Extracted:
    """Up to ``count`` rows in random order."""
    chosen = numpy_generator("features", seed, storage.absolute(uri)).permutation(len(features))[:count]
    rows = [
        StoredClip(i, f"{uri}#{i}", 0, hashlib.sha256(features[i].tobytes()).hexdigest(), uri, i)
        for i in chosen.tolist()
    ]
    return VideoFeatures.wrap(features[chosen]), rows
