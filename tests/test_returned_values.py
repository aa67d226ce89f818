"""What a hook returned is looked at field by field, where it comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specforge_core import returned
from specforge_core.errors import PluginError
from specforge_core.testing.plugin import FakeSite
from specforge_core.types import (
    Generated,
    TargetCapture,
)

from .bad_package import ASKED, CALLS, CAPTURE, GENERATED, VALUES, bad

# (hook, what it returns, what is told)
FIELDS = [
    ("adapter", "adapter(layers=1)", "CaptureSpec with layers 1, expected a tuple of layers"),
    ("adapter", "adapter(layers=[1])", "layers [1], expected a tuple of layers from -1 to 1"),
    ("adapter", "adapter(layers=(1.0,))", "layers (1.0,), expected a tuple"),
    ("adapter", "adapter(layers=(True,))", "layers (True,), expected a tuple"),
    ("adapter", "adapter(layers=(2,))", "layers (2,), expected a tuple of layers from -1 to 1"),
    ("adapter", "adapter(final='normed')", "final 'normed', expected one of ('none', 'pre_norm'"),
    ("adapter", "adapter(fields=None)", "fields None, expected a Field by name"),
    ("adapter", "adapter(fields={'x': 3})", "fields {'x': 3}, expected a Field"),
    ("adapter", "adapter(fields={3: TOKENS})", "expected a Field by name"),
    ("adapter", "adapter(fields={'x': Field(shape=[None], dtype='int64')})", "a Field by name"),
    ("adapter", "adapter(fields={'x': Field(shape=(-1,), dtype='int64')})", "a Field by name"),
    ("adapter", "adapter(fields={'x': Field(shape=(1,), dtype='int65')})", "a torch dtype"),
    ("adapter", "adapter(fields={'x': Field(shape=(1,), dtype=torch.half)})", "a torch dtype"),
    ("adapter", "adapter(next_tokens='yes')", "next_tokens 'yes', expected True or False"),
    ("adapter", "adapter(version='two')", "version 'two', expected a whole number"),
    ("draft", "draft_of(frozen=3)", "Draft with frozen 3, expected a module or None"),
    ("draft", "draft_of(shard=LINEAR)", "expected a tuple of modules inside of the model"),
    ("draft", "draft_of(shard=('layers',))", "expected a tuple of modules inside of the model"),
    ("draft", "draft_of(shard=(nn.Linear(1, 1),))", "expected a tuple of modules inside"),
    ("draft", "draft_of(model=LINEAR, shard=(LINEAR,))", "expected a tuple of modules inside"),
    ("draft", "draft_of(compile=(nn.Linear(1, 1),))", "expected a tuple of the model's modules"),
    ("draft", "draft_of(hidden=3)", "hidden 3, expected a tuple of the model's modules"),
    ("draft", "draft_of(saved=3)", "saved 3, expected a function of a name"),
    ("draft", "draft_of(saved=lambda name: 'bias' in name)", "saved leaves out 0.weight, expected"),
    ("draft", "draft_of(decayed=())", "decayed (), expected a function of a name"),
    ("draft", "draft_of(resolved={'a': {1}})", "expected values by name that JSON can write"),
    ("draft", "draft_of(resolved=[1])", "expected values by name that JSON can write"),
    ("draft", "draft_of(resolved={'a': float('nan')})", "expected values by name that JSON can"),
    ("draft", "draft_of(frozen=LINEAR)", "Draft with 0.weight in both model and frozen"),
    ("draft", "draft_of(model=nn.ParameterList([ONE * 1j]))", "0 of torch.complex64"),
    ("draft", "draft_of(model=nn.Linear(1, 1, device='meta'))", "weight on the meta device"),
    ("export", "export(weights={'w': ONE.to_sparse()})", "expected dense tensors with data"),
    ("export", "export(weights={'w': ONE.to('meta')})", "expected dense tensors with data"),
    ("export", "export(config=[])", "config [], expected values by name that JSON can write"),
    ("export", "export(config={'a': object})", "expected values by name that JSON can write"),
    ("export", "export(config={'a': float('nan')})", "expected values by name that JSON can"),
    ("export", "export(weights=[ONE])", "expected dense tensors with data"),
    ("export", "export(weights={'w': 3})", "weights {'w': 3}, expected dense tensors with data"),
    ("export", "export(weights={})", "weights {}, expected dense tensors with data"),
    ("export", "export(weights={3: ONE})", "expected dense tensors with data"),
    ("export", "export(files={'a.txt': 'text'})", "expected bytes by name"),
    ("export", "export(files=['a.txt'])", "files ['a.txt'], expected bytes by name"),
    ("export", "export(serve='engine')", "serve 'engine', expected options by engine"),
    ("export", "export(serve={'engine': ['x']})", "expected options by engine, each by name"),
    ("export", "export(environment={'e': {'A': 1}})", "variables by engine, each a text"),
    ("export", "export(causes=['a'])", "causes ['a'], expected a text by key"),
    ("export", "export(causes={'a': 3})", "causes {'a': 3}, expected a text by key"),
    ("export", "export(base=3)", "base 3, expected a model's name or None"),
    ("optimizers", "[]", "optimizers without weight, expected every trained parameter in one"),
    ("optimizers", "[torch.optim.SGD([draft.model.weight])]", "optimizers without bias"),
    ("optimizers", "[torch.optim.SGD(LINEAR.parameters())]", "2 parameters that are not the draft"),
    (
        "optimizers",
        "2 * [torch.optim.SGD(draft.model.parameters())]",
        "SGD with weight, which an",
    ),
    (
        "optimizers",
        "[torch.optim.SGD(draft.model.parameters(), float('nan'))]",
        "a group of lr nan",
    ),
]


FITS = [
    ("adapter", "adapter(layers=(-1, 1), final='post_norm', logsumexp=True)"),
    ("draft", "draft_of(shard=(LINEAR,), hidden=(), resolved={'a': (1, None)})"),
    ("draft", "draft_of(frozen=nn.Linear(1, 1), saved=lambda name: name != 'buffer')"),
    ("export", "export(config={'a': [1]}, files={'a': b''}, serve={'e': {'f': 1}}, base='m')"),
    ("export", "export(environment={'e': {'A': '1'}})"),
    ("optimizers", "[torch.optim.SGD([p]) for p in draft.model.parameters()]"),
]
LOOKS: dict[str, Any] = {
    "adapter": lambda found: returned.wrong_spec(found.spec, 2),
    "draft": returned.wrong_draft,
    "export": returned.wrong_export,
    "optimizers": lambda found: returned.wrong_optimizers(found, CALLS["optimizers"][1].model),
}


def look(hook: str, text: str) -> Any:
    """Return what is wrong with what a hook might return."""
    names: dict[str, Any] = {"torch": torch, "draft": CALLS["optimizers"][1]}
    exec(VALUES, names)
    return LOOKS[hook](eval(text, names))


@pytest.mark.parametrize(("hook", "text", "told"), FIELDS)
def test_a_wrong_field_is_told_with_what_fits(hook: str, text: str, told: str) -> None:
    assert told in ", expected ".join(look(hook, text))


@pytest.mark.parametrize(("hook", "text"), FITS)
def test_what_fits_is_taken(hook: str, text: str) -> None:
    assert look(hook, text) is None


@pytest.mark.parametrize("hook", LOOKS)
def test_a_wrong_field_names_package_and_hook(fake_site: FakeSite, hook: str) -> None:
    text, told = next((text, told) for name, text, told in FIELDS if name == hook)
    strategy = bad(fake_site, hook, "", f"return {text}", VALUES)
    with pytest.raises(PluginError, match=f"^specforge-bad 0.1.0, specforge_{hook}: ") as error:
        getattr(strategy, hook)(*CALLS[hook])
    assert told in str(error.value)


@pytest.mark.parametrize("most", [0, -1, 2.5, "'3'", None])
def test_a_proposer_drafts_at_least_one_token(fake_site: FakeSite, most: Any) -> None:
    body = f"return objects(start=1, propose=1, accept=1, max_tokens={most})()"
    strategy = bad(fake_site, "proposer", "", body, VALUES)
    with pytest.raises(PluginError, match=r"^specforge-bad 0\.1\.0, specforge_proposer: .* not "):
        strategy.proposer(*CALLS["proposer"])


@pytest.mark.parametrize("value", [[], {"x": [1]}, {3: torch.ones(1)}, True, {"x": None}])
def test_samples_and_batches_hold_tensors_by_name(value: Any) -> None:
    assert returned.wrong_tensors(value) is not None
    assert returned.wrong_tensors({"x": torch.ones(1)}) is None


def test_a_tensor_without_data_is_told_by_its_name() -> None:
    wrong = returned.wrong_tensors({"x": torch.ones(1, device="meta")})
    assert wrong == ("a dict with 'x': a tensor on the meta device", "tensors with data")


@pytest.mark.parametrize("done", ["'ok'", "draft", "1"])
def test_an_import_says_whether_it_is_done(fake_site: FakeSite, done: str) -> None:
    config, draft, target, _ = CALLS["export"]
    strategy = bad(fake_site, "import", "draft", f"return {done}")
    with pytest.raises(PluginError, match=r"specforge_import: returned .*, expected True once"):
        strategy.load_export(config, draft, target, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ("index=True", "with index True, expected the prompt's"),
        ("input_ids=[1]", "with input_ids [1], expected the prompt's tensor [T]"),
        ("loss_mask=None", "with loss_mask None, expected the prompt's tensor [T]"),
        ("hidden_states=None", "expected states [T, H] of the layers [1]"),
        ("hidden_states={1: torch.ones(3, 2)}", "expected states [T, H] of the layers [1]"),
        ("final=None", "final None, expected states [T, H], pre_norm"),
        ("logsumexp=None", "logsumexp None, expected one number for each token"),
    ],
)
def test_a_capture_has_what_the_spec_asks(fields: str, told: str) -> None:
    found = eval(CAPTURE % fields, {"torch": torch, "TargetCapture": TargetCapture})
    assert told in ", expected ".join(returned.wrong_capture(found, ASKED) or ())


@pytest.mark.parametrize(
    "fields", ["tokens=(1.5,)", "tokens='ab'", "finished=None", "index='a'", "refused=True"]
)
def test_an_answer_has_ids_and_says_whether_it_ended(fields: str) -> None:
    assert returned.wrong_generated(eval(GENERATED % fields, {"Generated": Generated}))
    assert returned.wrong_generated(eval(GENERATED % "", {"Generated": Generated})) is None
