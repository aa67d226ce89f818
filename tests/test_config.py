"""The two passes of validation, overrides, and what a user reads when a config is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from specforge_core.config import RegenerateConfig, RunConfig
from specforge_core.errors import ConfigError
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
    ("text", "value"), [("1e-4", 1e-4), ("1.e-3", 1e-3), ("0.5", 0.5), ("3", 3.0)]
)
def test_overrides_read_numbers_as_a_person_writes_them(
    config: Path, text: str, value: float
) -> None:
    assert load(config, f"train.learning_rate={text}").train.learning_rate == value


def test_overrides_make_sections_lists_and_nulls(config: Path) -> None:
    run = load(config, "data.train=[a.jsonl, b.jsonl]", "train.max_steps=null")
    assert run.data.train == ("a.jsonl", "b.jsonl")
    assert run.train.max_steps is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lerning_rate=1", "train.lerning_rate: unknown key, did you mean 'learning_rate'?"),
        ("strategy.blok_size=1", "strategy.blok_size: unknown key, did you mean 'block_size'?"),
        ("nonsense=1", "nonsense: unknown key (known: target, strategy"),
        ("train.learning_rate=fast", "train.learning_rate: Input should be a valid number"),
        ("train.learning_rate=-1", "greater than 0, got -1"),
        ("strategy.block_size=big", "strategy.block_size: Input should be a valid integer"),
        ("data.follow=true", "data.follow needs data.capture_dir"),
        ("no-equals-sign", "override 'no-equals-sign' is not KEY=VALUE"),
        ("target.path.deep=1", "'path' is not a section"),
        ("train.betas=[", "the value is not valid YAML"),
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
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(config: Path, text: str, message: str) -> None:
    config.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(config)
    assert message in str(error.value)


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
