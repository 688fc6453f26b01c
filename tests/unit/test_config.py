"""Strict configuration: every mistake is an error that names the key."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from ardiff.config import (
    CONFIGS,
    base_files,
    build,
    find_config,
    fingerprint,
    load_config,
    read_settings,
    to_dict,
    to_yaml,
)
from ardiff.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    lr: float = 1e-3
    steps: int = 10
    warmup_steps: int = 0
    kind: Literal["adamw", "muon"] = "adamw"
    flag: bool = False

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError("lr must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Middle:
    optimizer: Inner = field(default_factory=Inner)
    name: str = "run"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    train: Middle = field(default_factory=Middle)
    sizes: tuple[int, ...] = (1, 2)
    names: tuple[str, ...] = ()
    limit: int | None = None
    label: str | None = None
    extra: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Needy:
    source: str
    count: int
    rest: int = 0


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_defaults() -> None:
    assert load_config(Outer) == load_config(Outer, []) == Outer()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.optimizer.warmup_step=3",
            r"'train\.optimizer\.warmup_step': did you mean 'train\.optimizer\.warmup_st",
        ),
        ("train.optimzer.lr=1", r"'train\.optimzer': did you mean 'train\.optimizer'\?"),
        ("trian.name=x", r"'trian': did you mean 'train'\?"),
        ("qqqq=1", r"'qqqq': valid keys: train, sizes, names, limit, label, extra\."),
    ],
)
def test_unknown_keys_name_the_path_and_the_nearest_valid_one(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"Unknown configuration key {message}"):
        load_config(Outer, None, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.optimizer.steps=abc", r"'train\.optimizer\.steps' must be of type int, not 'abc'"),
        ("train.optimizer.steps=1.5", r"'train\.optimizer\.steps' must be of type int, not 1\.5"),
        ("train.optimizer.steps=true", "must be of type int, not True"),
        ("train.optimizer.steps=null", "must be of type int, not None"),
        ("train.optimizer.steps=.inf", "must be of type int, not inf"),
        ("train.optimizer.steps=.nan", "must be of type int, not nan"),
        ("train.optimizer.lr=fast", r"'train\.optimizer\.lr' must be of type float, not 'fast'"),
        ("train.optimizer.lr=true", "must be of type float, not True"),
        ("train.optimizer.lr=[1]", "must be of type float"),
        ("train.optimizer.flag=1", "must be of type bool, not 1"),
        ("train.optimizer.flag='true'", "must be of type bool, not 'true'"),
        ("train.name=5", "must be of type str, not 5"),
        ("train.optimizer.kind=sgd", r"'train\.optimizer\.kind' must be one of adamw, muon, not 'sgd'"),
        ("train.optimizer=3", r"'train\.optimizer' is a section with its own keys, not 3"),
        ("sizes=3", "'sizes' must be a list, not 3"),
        ("sizes='3,4'", "'sizes' must be a list, not '3,4'"),
        ("sizes=[1, x]", r"'sizes\[1\]' must be of type int, not 'x'"),
        ("limit=x", "'limit' must be of type int, not 'x'"),
        ("extra=[1]", "'extra' must be a mapping"),
    ],
)
def test_wrong_types_name_the_key_and_the_type(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, None, [override])


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("2E3", 2000.0), ("3", 3.0), ("0.5", 0.5), ("1.0e-4", 1e-4)]
)
def test_numbers_become_floats_however_they_are_written(tmp_path: Path, text: str, value: float) -> None:
    """PyYAML reads 1e-4 as text."""
    file = write(tmp_path / "c.yaml", f"train: {{optimizer: {{lr: {text}}}}}")
    for config in (load_config(Outer, [file]), load_config(Outer, None, [f"train.optimizer.lr={text}"])):
        assert config.train.optimizer.lr == value
        assert type(config.train.optimizer.lr) is float


def test_values_of_every_kind() -> None:
    inner = [f"train.optimizer.{setting}" for setting in ("kind=muon", "flag=true", "steps=2.0")]
    outer = ["sizes=[3, 4, 5]", "names=[a, b]", "limit=7", "label=x=y", "train.name=a b", "extra={a: 1}"]
    config = load_config(Outer, None, [*inner, *outer])
    assert config.train == Middle(optimizer=Inner(kind="muon", flag=True, steps=2), name="a b")
    assert (config.sizes, config.names, config.limit) == ((3, 4, 5), ("a", "b"), 7)
    assert type(config.train.optimizer.steps) is int
    assert (config.label, config.extra) == ("x=y", {"a": 1})
    assert load_config(Outer, None, ["names=a, b c"]).names == load_config(Outer, None, ["names=[a, b c]"]).names
    assert load_config(Outer, None, ["limit=null", "label=null", "sizes=[]"]) == Outer(sizes=())


@dataclass(frozen=True, kw_only=True, slots=True)
class Switches:
    mode: Literal["off", "auto"] = "auto"
    kind: Literal["a", "b"] = "a"


def test_off_is_a_word_where_it_is_a_choice(tmp_path: Path) -> None:
    """YAML 1.1 reads it as false."""
    (tmp_path / "a.yaml").write_text("mode: off\n")
    for config in (load_config(Switches, None, ["mode=off"]), load_config(Switches, [tmp_path / "a.yaml"])):
        assert config == Switches(mode="off")
        (tmp_path / "b.yaml").write_text(to_yaml(config))
        assert load_config(Switches, [tmp_path / "b.yaml"]) == config
    for override in ("kind=off", "mode=on"):
        with pytest.raises(ConfigError, match="must be one of"):
            load_config(Switches, None, [override])


def test_later_overrides_win() -> None:
    assert load_config(Outer, None, ["limit=1", "limit=2"]).limit == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("limit", "'limit' is not an override: write key.path=value"),
        ("=3", "'=3' is not an override"),
        ("limit=[", "The value of override .* is not valid YAML"),
        ("limit.deeper=3", "'limit' is a section|must be of type int"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, None, [override])


def test_a_value_is_no_section(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "limit: 3")
    with pytest.raises(ConfigError, match="'limit' is a value, not a section"):
        load_config(Outer, [file], ["limit.deeper=3"])


def test_a_folder_holds_one_file_per_field(tmp_path: Path) -> None:
    write(tmp_path / "train.yaml", "name: folder\noptimizer:\n  lr: 0.5\n")
    write(tmp_path / "notes.txt", "not read")
    config = load_config(Outer, [tmp_path])
    assert config == Outer(train=Middle(name="folder", optimizer=Inner(lr=0.5)))
    write(tmp_path / "trian.yaml", "name: x")
    with pytest.raises(ConfigError, match="'trian': did you mean 'train'"):
        load_config(Outer, [tmp_path])


def test_later_paths_override_earlier_ones_key_by_key(tmp_path: Path) -> None:
    first = write(tmp_path / "a" / "train.yaml", "name: first\noptimizer: {lr: 0.5, steps: 3}").parent
    second = write(tmp_path / "b.yaml", "train: {optimizer: {lr: 0.25}}\nsizes: [9]")
    config = load_config(Outer, [first, str(second)], ["train.optimizer.steps=4"])
    assert config == Outer(train=Middle(name="first", optimizer=Inner(lr=0.25, steps=4)), sizes=(9,))
    assert load_config(Outer, [second, first]).train.optimizer.lr == 0.5


def test_a_file_overlays_its_base(tmp_path: Path) -> None:
    first = write(tmp_path / "paper" / "first.yaml", "label: paper\ntrain: {name: first, optimizer: {lr: 1, steps: 2}}")
    second = write(tmp_path / "paper" / "second.yaml", "base: first.yaml\ntrain: {optimizer: {steps: 3}}")
    third = write(tmp_path / "sky" / "third.yaml", "base: ../paper/second.yaml\nlabel: sky")
    config = load_config(Outer, [third])
    assert (config.label, config.train) == ("sky", Middle(name="first", optimizer=Inner(lr=1, steps=3)))
    assert [file.resolve() for file in base_files(third)] == [second, first]
    assert [file.resolve() for file in base_files(tmp_path / "paper")] == [first]
    write(first, "base: ../sky/third.yaml")
    with pytest.raises(ConfigError, match="has itself as its base"):
        load_config(Outer, [third])
    write(first, "base: nowhere.yaml")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(Outer, [third])


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(Outer, [write(tmp_path / "c.yaml", "# nothing\n")]) == Outer()


@pytest.mark.parametrize(
    ("text", "message"), [("[1, 2]", "must hold a mapping .* not a list"), ("a: [", r"c\.yaml is not valid YAML")]
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, [write(tmp_path / "c.yaml", text)])


def test_places_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot read the configuration .*no\.yaml: No such file"):
        load_config(Outer, [tmp_path / "no.yaml"])
    with pytest.raises(ConfigError, match=r"has no \.yaml file"):
        load_config(Outer, [tmp_path])


def test_missing_values_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"Missing configuration value.*source, count"):
        load_config(Needy)
    assert load_config(Needy, None, ["source=a", "count=1"]) == Needy(source="a", count=1)


def test_what_the_dataclass_refuses_is_a_configuration_error_with_the_path() -> None:
    with pytest.raises(ConfigError, match=r"^train\.optimizer: lr must be above 0$"):
        load_config(Outer, None, ["train.optimizer.lr=-1"])
    with pytest.raises(ConfigError, match=r"^Inner: lr must be above 0$"):
        load_config(Inner, None, ["lr=0"])


def test_yaml_round_trip() -> None:
    config = load_config(Outer, None, ["train.optimizer.lr=1e-7", "sizes=[3]", "label=x", "names=[a]", "extra={a: 1}"])
    tree = yaml.safe_load(to_yaml(config))
    assert tree == to_dict(config)
    assert list(tree) == ["train", "sizes", "names", "limit", "label", "extra"]
    assert build(Outer, tree) == config


def test_fingerprint_names_the_values() -> None:
    name = fingerprint(Outer())
    assert name == fingerprint(Outer(train=Middle(optimizer=Inner()))) == fingerprint(build(Outer, to_dict(Outer())))
    assert len(name) == 16
    assert set(name) <= set("0123456789abcdef")
    others = [
        fingerprint(Outer(sizes=(2, 1))),
        fingerprint(Outer(train=Middle(optimizer=Inner(lr=2e-3)))),
        fingerprint(Outer(label="x")),
        fingerprint(Outer(), 0),
        fingerprint(),
    ]
    assert len({name, *others}) == 6
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint("a", "b") != fingerprint("b", "a") != fingerprint("ab")


def test_fingerprints_do_not_change_between_versions() -> None:
    """They name folders of latents and checkpoints that outlive a release."""
    assert fingerprint({"num_frames": 16}, "abc", 1e-4) == "476d56f3e22bff80"


def test_shipped_configurations_are_found_here_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = find_config("quickstart")
    assert (shipped / "train_dit.yaml").is_file()
    write(tmp_path / "configs" / "quickstart" / "train_dit.yaml", "")
    assert find_config("quickstart") == tmp_path / "configs" / "quickstart"
    monkeypatch.setenv(CONFIGS, str(tmp_path / "opt"))  # of the image, whose package has none beside it
    write(tmp_path / "opt" / "quickstart" / "ablation.yaml", "")
    assert find_config("quickstart/ablation.yaml") == tmp_path / "opt" / "quickstart" / "ablation.yaml"
    assert find_config("quickstart") == tmp_path / "configs" / "quickstart"
    with pytest.raises(ConfigError, match="configs/nothing"):
        find_config("nothing")


def test_commands_of_the_documentation_find_shipped_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = read_settings(["configs/quickstart/generate.yaml"])
    assert shipped == read_settings([find_config("quickstart") / "generate.yaml"])
    write(tmp_path / "configs" / "quickstart" / "generate.yaml", "num_videos: 3")
    assert read_settings(["configs/quickstart/generate.yaml"]) == {"num_videos": 3}
    with pytest.raises(ConfigError, match="no configuration 'configs/quickstart/nothing"):
        read_settings(["configs/quickstart/nothing.yaml"])
    with pytest.raises(ConfigError, match="Cannot read the configuration nothing"):
        read_settings(["nothing.yaml"])
