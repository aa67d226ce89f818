"""Every number of a config: what no run can use is refused by its key, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from specforge_core.config import RunConfig, StrategyConfig
from specforge_core.load import validate
from specforge_core.plugins import STRATEGIES, discover
from specforge_core.section import MANY, Section

INFINITE = (float("nan"), float("inf"), -float("inf"))
# of every number: what is no number, what is not finite, and what no machine can count
NEVER = (*INFINITE, 1e308, -1e308, 10**30, -(10**30), True, {"a": 1})
BY_TARGET = "is compared with the target, which has no such token or layer"
SEED = "any number of 32 bits is one"
# what is below 0 or above MANY and accepted, and why
ACCEPTED = {
    "seed": ({MANY + 1}, SEED),
    "mask_token_id": ({MANY + 1}, BY_TARGET),
    "draft_vocab_size": ({MANY + 1}, BY_TARGET),
    "rope_theta": ({MANY + 1}, "models in use have a base of 1e11"),
    "layer": ({-1, MANY + 1}, BY_TARGET),
}


def kinds(annotation: Any) -> Iterator[Any]:
    """Yield every type in an annotation."""
    yield annotation
    for inner in get_args(annotation):
        yield from kinds(inner)


def refused(model: type[BaseModel], raw: dict[str, Any], option: str) -> bool:
    """Say whether a section is refused, by that key."""
    try:
        model.model_validate(raw)
    except ValidationError as exc:
        told = [f"{error['loc']} {error['msg']}" for error in exc.errors()]
    else:
        return False
    assert [text for text in told if option not in text] == []
    return True


def check(model: type[BaseModel], beside: dict[str, Any]) -> None:
    """Give every option of numbers what no run can use."""
    found = numbers(model)
    assert found
    for option, field in found.items():
        types = set(kinds(field.annotation))
        accepted = ACCEPTED.get(option, (set(), ""))[0]
        values: list[Any] = [*NEVER, -1, MANY + 1]
        if str not in types:
            values += ["text", ""]
        if any(getattr(kind, "__origin__", kind) is tuple for kind in types):
            values += [[one] for one in (*INFINITE, 1e308)]
        else:
            values.append([1])
        if type(None) not in types:
            values.append(None)
        for value in values:
            counts = isinstance(value, int) and value is not True and value in accepted
            assert refused(model, {**beside, option: value}, option) != counts, (option, value)


def numbers(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the options of a section that can be numbers."""
    found = model.model_fields.items()
    return {name: field for name, field in found if {int, float} & set(kinds(field.annotation))}


SECTIONS = {
    name: field.annotation
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type)
    and issubclass(field.annotation, Section)
    and field.annotation is not StrategyConfig
}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_number_that_no_run_can_use_is_refused_by_its_key(section: str) -> None:
    model = SECTIONS[section]
    assert model is not None
    beside = {"path": "x"} if section == "target" else {}
    check(model, beside)


@pytest.mark.parametrize("name", sorted(discover(STRATEGIES)))
def test_so_is_one_of_a_strategy(name: str) -> None:
    config, _ = validate({"target": {"path": "x"}, "strategy": {"name": name}}, "here")
    check(type(config.strategy), {"name": name})
