"""What goes wrong in an object that a hook returned names its package, whenever it is called."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from specforge_core.config import TargetConfig
from specforge_core.errors import PluginError
from specforge_core.testing.plugin import FakeSite
from specforge_core.types import (
    GenerateOptions,
    Sampling,
)
from specforge_core.watch import Watch, watched_optimizer

from .bad_package import ASKED, CALLS, CAPTURE, GENERATED, PROMPT, VALUES, bad


def results(site: FakeSite, method: str, body: str) -> list[object]:
    """Return what an engine that is another package's yields."""
    members = "info=1, supports=1, capture=1, generate=1, close=1"
    source = f"""import torch
from specforge_core import hookimpl
{VALUES}
def run(prompts, how=None):
    {body}
@hookimpl
def specforge_target_engine(target):
    if target.engine == "acme":
        return type("Mine", (), {{**dict({members}), "{method}": staticmethod(run)}})()
"""
    group = {"specforge.plugins": {"acme": "acme_engine"}}
    site.dist("acme-engine", "0.3", group, module="acme_engine", source=source)
    strategy = bad(site, "train_step", "", "return step")
    target = TargetConfig(path="x", engine="acme")
    engine = strategy.target_engine(target, torch.device("cpu"))
    if method == "capture":
        return list(engine.capture([PROMPT], ASKED))
    if method == "generate":
        return list(engine.generate([PROMPT], GenerateOptions(max_new_tokens=2)))
    return [getattr(engine, method)(ASKED)]


@pytest.mark.parametrize(
    ("method", "body", "told"),
    [
        ("capture", "return None", "returned None, expected results to go through"),
        ("capture", "return [1]", "returned int, expected TargetCapture"),
        ("capture", "return how.absent", "AttributeError: 'CaptureSpec' object has no attribute"),
        ("capture", "yield how.absent", "AttributeError: 'CaptureSpec' object has no attribute"),
        ("capture", "exit(0)", "SystemExit: 0"),
        ("capture", f"yield {CAPTURE % 'hidden_states={}'}", "of the layers [1]"),
        ("generate", "return None", "returned None, expected results to go through"),
        ("generate", "yield 3", "returned int, expected Generated"),
        ("generate", f"yield {GENERATED % 'tokens=torch.ones(2)'}", "expected a tuple of ids"),
        ("supports", "return None", "returned None, expected True or False"),
        ("info", "pass", "expected info of type TargetInfo"),
    ],
)
def test_an_engine_s_results_are_of_the_kinds_that_were_asked_for(
    fake_site: FakeSite, method: str, body: str, told: str
) -> None:
    with pytest.raises(PluginError, match=r"^acme-engine 0\.3, specforge_target_engine: ") as error:
        results(fake_site, method, body)
    assert told in str(error.value)


def test_right_results_pass(fake_site: FakeSite) -> None:
    (found,) = results(fake_site, "capture", f"yield {CAPTURE % ''}")
    assert found.index == 3  # type: ignore[attr-defined]


GREEDY = Sampling(temperature=0.0, generator=torch.Generator())
USES: dict[str, Any] = {
    "propose": lambda found: found.propose(1, 2, GREEDY),
    "start": lambda found: found.start(1),
    "accept": lambda found: found.accept(1),
    "len": len,
    "item": lambda found: found[0],
    "all": list,
    "num_bytes": lambda found: found.num_bytes,
    "fingerprint": lambda found: found.fingerprint(),
}


@pytest.mark.parametrize(
    ("hook", "members", "use", "told"),
    [
        ("proposer", "propose=lambda *_: 3", "propose", "returned int, expected Proposal"),
        (
            "proposer",
            "propose=lambda *_: Proposal(tokens=[1], probs=None)",
            "propose",
            "tokens [1]",
        ),
        (
            "proposer",
            "propose=lambda *_: Proposal(tokens=ONE, probs=None)",
            "propose",
            "expected a tensor [K] int64",
        ),
        ("proposer", "propose=lambda last, *_: last.absent", "propose", "AttributeError: 'int'"),
        ("proposer", "start=lambda prefix: exit(0)", "start", "SystemExit: 0"),
        ("proposer", "accept=lambda new: new[7]", "accept", "TypeError: 'int' object is not subs"),
        ("reader", "__len__=lambda: -1", "len", "ValueError: __len__() should return >= 0"),
        ("reader", "__getitem__=lambda i: None", "item", "NoneType, expected a dict of te"),
        (
            "reader",
            "__getitem__=lambda i: {'x': 3}",
            "item",
            "returned a dict with 'x': int",
        ),
        ("reader", "__getitem__=lambda i: [][i]", "item", "IndexError: list index out of"),
        ("conversations", "__iter__=lambda: iter([1 / 0])", "all", "ZeroDivisionError"),
        (
            "conversations",
            "num_bytes='x', fingerprint=lambda: 'a'",
            "num_bytes",
            "a number",
        ),
        ("conversations", "num_bytes=1, fingerprint=lambda: 3", "fingerprint", "a fingerprint, a"),
    ],
)
def test_what_goes_wrong_in_an_object_of_a_hook_names_its_package(
    fake_site: FakeSite, hook: str, members: str, use: str, told: str
) -> None:
    have = {
        "proposer": "max_tokens=2, start=1, propose=1, accept=1",
        "reader": "__len__=lambda: 4, __getitem__=lambda i: {}",
        "conversations": "__iter__=lambda: iter([])",
    }[hook]
    body = f"return objects(**{{**dict({have}), **dict({members})}})()"
    found = getattr(bad(fake_site, hook, "", body, VALUES), hook)(*CALLS[hook])
    with pytest.raises(PluginError, match=f"^specforge-bad 0.1.0, specforge_{hook}: ") as error:
        USES[use](found)
    assert told in str(error.value)


def test_an_optimizer_is_freed_with_its_states_when_nobody_uses_it_any_more() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    watched = watched_optimizer(optimizer, Watch(guard=nullcontext, check=print))
    assert watched is optimizer
    weight.grad = torch.ones(2)
    step = watched.step
    step()
    assert weight.detach().lt(1).all()
    freed = weakref.ref(optimizer)
    gc.disable()  # what looks for cycles
    try:
        del optimizer, watched, step
        assert freed() is None
    finally:
        gc.enable()
