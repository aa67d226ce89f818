"""The two passes of validation, overrides, and what a user reads when a config is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from specforge_core.config import RegenerateConfig, RunConfig
from specforge_core.errors import ConfigError, SpecForgeError
from specforge_core.load import load_config
from specforge_core.testing.plugin import FakeSite

from .test_plugins import GOOD

YAML = "target: {path: toy}\nstrategy: {name: good}\n"


@pytest.fixture
def config(env: FakeSite, tmp_path: Path) -> Path:
    env.strategy("good", GOOD)
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path


def load(path: Path, *overrides: str) -> RunConfig:
    return load_config(path, overrides)[0]


def test_the_plugin_validates_its_own_section(config: Path) -> None:
    run = load(config, "strategy.block_size=8")
    assert run.model_dump()["strategy"] == {"name": "good", "block_size": 8}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1.e-3", 1e-3), ("0.5", 0.5), ("3", 3.0), ("010", 10.0), ("+2", 2.0)],
)
def test_overrides_read_numbers_as_a_person_writes_them(
    config: Path, text: str, value: float
) -> None:
    assert load(config, f"train.learning_rate={text}").train.learning_rate == value


def test_one_file_of_prompts_needs_no_list(config: Path) -> None:
    assert load(config, "regenerate.prompts=a.jsonl").regenerate.prompts == (Path("a.jsonl"),)


def test_overrides_make_sections_lists_and_nulls(config: Path) -> None:
    run = load(config, "data.train=[a.jsonl, b.jsonl]", "train.max_steps=null")
    assert run.data.train == ("a.jsonl", "b.jsonl")
    assert run.train.max_steps is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lerning_rate=1", "train.lerning_rate: unknown key, did you mean 'learning_rate'?"),
        ("strategy.blok_size=1", "strategy.blok_size: unknown key, did you mean 'block_size'?"),
        ("max_steps=5", "max_steps: unknown key, did you mean train.max_steps?"),
        ("nonsense=1", "nonsense: unknown key (known: target, strategy"),
        ("train.learning_rate=fast", "train.learning_rate: Input should be a valid number"),
        ("train.learning_rate=-1", "greater than 0, got -1"),
        ("strategy.block_size=big", "strategy.block_size: Input should be a valid integer"),
        ("data.follow=true", "data.follow needs data.capture_dir"),
        ("no-equals-sign", "override 'no-equals-sign' is not KEY=VALUE"),
        ("target.path.deep=1", "'path' is not a section"),
        ("train..betas=1", "is not KEY=VALUE"),
        (".".join("a" * 40) + "=1", "is not KEY=VALUE"),
        ("train.betas=[", "is not valid YAML in line 1, column 2"),
        ("train.max_steps=", "has no value. Try: train.max_steps=null"),
        ("target.revision=2024", "valid string, got 2024: text that looks like something else"),
        ("target.revision=12e4567", "is too large a number: quote it"),
        ("train.precision=bf16", "train.precision: Input should be 'fp8', or null, got 'bf16'"),
        ("train.max_steps=true", "train.max_steps: Input should be a number, got True"),
        ("train.learning_rate=+.inf", "train.learning_rate: Input should be a finite number"),
        ("train.learning_rate=inf", "train.learning_rate: Input should be a finite number"),
        ("train.epochs=.nan", "train.epochs: Input should be a finite number, got nan"),
        ("train.epochs=.inf", "train.epochs: Input should be a finite number, got inf"),
        ("train.seed=2024-13-45", "train.seed: Input should be a valid integer"),
        ("train.threads=1000000000000", "less than or equal to 1024, got 1000000000000"),
        ("train.epochs=1e308", "less than or equal to 1000000, got 1e+308"),
        ("train.betas=[.nan, 0.9]", "train.betas.0: Input should be a finite number, got nan"),
        ("train.betas=[0.9, 1]", "train.betas: both are 0 or more, and less than 1, got [0.9, 1]"),
        ("train.betas=[-1, 0.9]", "train.betas: both are 0 or more"),
        ("train.seed=1" + "0" * 30, "train.seed: Input should be less than or equal to 4294967295"),
        ("train.threads=1000000000", "less than or equal to 1024, got 1000000000"),
        ("train.batch_size=1000000000", "less than or equal to 4096"),
        ("capture.window=1000000000", "less than or equal to 4096"),
        ("eval.temperature=1e-40", "a temperature is 0 (the likeliest token), or 0.001 and more"),
        ("eval.seed=-1", "greater than or equal to 0"),
        ('output_dir="a\\0b"', "is not valid YAML in line 1, column 1: text holds a NUL"),
        ("output_dir=" + "x" * 300, "output_dir: this path is too long: 255 bytes for a name"),
        ("target.path=" + "x/" * 3000, "target.path: this path is too long"),
        ("data.train=['']", "data.train: a path is empty, got ['']"),
        ("regenerate.prompts=['']", "regenerate.prompts: a path is empty, got"),
        ("output_dir=''", "output_dir: a path is empty, got ''"),
        ("data.capture_dir=''", "data.capture_dir: a path is empty"),
        (f"data.train=[{'x' * 300}]", "data.train: this path is too long"),
        (f"eval.prompts={{a: {'x' * 300}}}", "eval.prompts: this path is too long"),
        ("train.betas=0.9", "train.betas: Input should be a list, as [A, B], got 0.9"),
        ("regenerate.prompts=3", "regenerate.prompts: Input should be a list, as [A, B], got 3"),
        (
            "data.validation=null",
            "Input should be a valid number, or a list, as [A, B], got None\n",
        ),
        (
            "data.validation=[1]",
            "config:\n  data.validation.0: Input should be a valid string, got 1",
        ),
        ("output_dir=2024", "output_dir: Input should be a path, got 2024: text that looks like"),
        ("train=[]", "train: Input should be a section, as {KEY: VALUE}, got []"),
        ("plugins=false", "plugins must hold a section by plugin, got False"),
    ],
)
def test_a_wrong_override_says_which_key_and_value(
    config: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(config, override)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("strategy: {name: good}\n", "target: required, and missing"),
        ("target: {path: x}\n", "strategy.name is missing. `specforge strategies` lists"),
        ("target: {path: x}\nstrategy: good\n", "strategy.name is missing"),
        ("- a\n- b\n", "must hold a mapping of sections, not list"),
        ("", "is empty. `specforge config` prints what it may hold"),
        ("a: [", "is not valid YAML in line 1, column 5"),
        (
            f"{YAML}train: {{max_steps: 5}}\ntrain: {{keep: 1}}\n",
            "the key 'train' is in line 3 too",
        ),
        (f"{YAML}train:\n  keep: 1\n  keep: 2\n", "line 5, column 3: the key 'keep' is in line 4"),
        (f"{YAML}train:\n", "train: Input should be a section, as {KEY: VALUE}, got None"),
        (
            f"{YAML}train.keep: 1\n",
            "unknown key, only of an override: in a file it is train: {keep",
        ),
        (f"{YAML}data: {{limit: 1:30}}\n", "data.limit: Input should be a valid integer"),
        (f"{YAML}\ud800", "is not UTF-8 text (byte 43)"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(config: Path, text: str, message: str) -> None:
    config.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ConfigError) as error:
        load(config)
    assert message in str(error.value)


def test_a_message_is_short_whatever_the_value(config: Path) -> None:
    config.write_text(YAML)
    for override in (
        f"train.seed={[[*range(9)] for _ in range(900)]}",
        f"train.seed='{'x' * 90_000}'",
        f"{'k' * 90_000}=1",
        f"train={{{', '.join(f'k{i}: 1' for i in range(5000))}}}",
        f"strategy.name={'s' * 90_000}",
        f"target.engine={{a: {'s' * 90_000}}}",
        f"data.on_error={'s' * 90_000}",
    ):
        with pytest.raises(SpecForgeError) as error:
            load(config, override)
        assert len(str(error.value)) < 2000


@pytest.mark.parametrize("kind", ["directory", "pipe", "null", "huge", "nul in its name"])
def test_what_is_no_text_file_is_not_waited_for(config: Path, kind: str) -> None:
    config.unlink()
    if kind == "directory":
        config.mkdir()
    elif kind == "pipe":
        os.mkfifo(config)
    elif kind == "null":
        config.symlink_to("/dev/zero")
    elif kind == "huge":
        config.write_bytes(b"#" * (1 << 21))
    else:
        config = config.with_name("a\0b")
    messages = {
        "directory": "cannot be read: Is a directory",
        "huge": "is larger than 1048576 bytes",
        "nul in its name": "cannot be read: embedded null byte",
    }
    with pytest.raises(ConfigError, match=messages.get(kind, "is not a file")):
        load(config)


def test_a_byte_order_mark_and_numbers_of_yaml_1_2(config: Path) -> None:
    text = "\ufeff" + YAML.replace("path: toy", "path: toy, revision: no, options: {a: 2024-13-45}")
    config.write_text(f"{text}train: {{max_steps: 010, learning_rate: 1e-4, profile: on}}\n")
    run = load(config)
    assert (run.train.max_steps, run.train.learning_rate, run.train.profile) == (10, 1e-4, True)
    assert (run.target.revision, run.target.options) == ("no", {"a": "2024-13-45"})


def test_an_override_changes_one_of_two_sections_that_share_a_value(config: Path) -> None:
    config.write_text(YAML + "eval: &e {limit: 3}\nregenerate: {batch_size: 2}\ndata: *e\n")
    run = load(config, "data.limit=4", "train.max_steps=5")
    assert (run.eval.limit, run.data.limit, run.train.max_steps) == (3, 4, 5)


def test_an_override_fills_an_empty_section(config: Path) -> None:
    config.write_text(f"{YAML}train:\n")
    assert load(config, "train.max_steps=5").train.max_steps == 5


def test_a_missing_file_is_named(env: FakeSite, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml' cannot be read: No such file"):
        load(tmp_path / "absent.yaml")


def test_a_stored_config_loads_again(config: Path) -> None:
    from specforge_core.load import validate

    run = load(config, "data.train=[a.jsonl]", "strategy.block_size=4")
    again, _ = validate(run.model_dump(mode="json"), "stored")
    assert again == run


def test_servers_of_0_1_are_an_engine_now() -> None:
    """A config that 0.1 stored without servers is read as before."""
    assert RegenerateConfig.model_validate({"urls": [], "seed": 3}) == RegenerateConfig(seed=3)
    with pytest.raises(
        ValueError, match=r"target\.engine=openai target\.options\.urls=\[http://a:1"
    ):
        RegenerateConfig.model_validate({"urls": ["http://a:1"]})
