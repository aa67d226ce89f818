"""What goes wrong in a package's code names the package, the hook, and what was expected."""

from __future__ import annotations

import pytest
import torch

from specforge_core.config import TrainConfig
from specforge_core.errors import CheckpointError, PluginError
from specforge_core.strategy import Strategy
from specforge_core.testing.plugin import FakeSite
from specforge_core.types import Export

from .bad_package import BASE, CALLS, CONFIG, DRAFT, SPEC, TARGET, bad


@pytest.mark.parametrize("hook", CALLS)
def test_a_hook_that_raises_names_itself_and_its_package(fake_site: FakeSite, hook: str) -> None:
    strategy = bad(fake_site, hook, "", "raise KeyError('missing')")
    with pytest.raises(PluginError) as error:
        getattr(strategy, hook)(*CALLS[hook])
    assert str(error.value) == f"specforge-bad 0.1.0, specforge_{hook}: KeyError: 'missing'"


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        ("OSError('no network')", "OSError: no network"),
        ("PermissionError(13, 'Permission denied', 'x')", "PermissionError: [Errno 13]"),
        ("SystemExit(0)", "SystemExit: 0"),
        ("RecursionError('deep')", "RecursionError: deep"),
        ("ValueError('x' * 10**6)", "ValueError: xxx"),
    ],
)
def test_whatever_a_hook_raises_has_its_name_and_status(
    fake_site: FakeSite, raised: str, told: str
) -> None:
    strategy = bad(fake_site, "adapter", "", f"raise {raised}")
    with pytest.raises(PluginError, match=r"^specforge-bad 0\.1\.0, specforge_adapter: ") as error:
        strategy.adapter(CONFIG, TARGET)
    assert told in str(error.value)
    assert len(str(error.value)) < 1000
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("return int(export.config['layers'])", CheckpointError),
        ("return export.config['absent']", CheckpointError),
        ("return export.config['layers'].get('x')", CheckpointError),
        ("raise RuntimeError('mine')", PluginError),
    ],
)
def test_a_damaged_export_is_not_its_package_s_fault(
    fake_site: FakeSite, body: str, kind: type[Exception]
) -> None:
    strategy = bad(fake_site, "import", "export", body)
    export = Export(config={"layers": [1]}, weights={})
    with pytest.raises(kind, match=r"specforge-bad 0\.1\.0, specforge_import: "):
        strategy.load_export(CONFIG, DRAFT, TARGET, export)


def test_a_config_error_of_an_export_is_the_export_s(fake_site: FakeSite) -> None:
    body = "from specforge_core.errors import ConfigError; raise ConfigError('no such rope')"
    strategy = bad(fake_site, "import", "export", body)
    with pytest.raises(CheckpointError, match="has a value that cannot be used: no such rope"):
        strategy.load_export(CONFIG, DRAFT, TARGET, Export(config={}, weights={}))


def test_a_message_is_cut_whatever_is_in_it() -> None:
    text = str(CheckpointError(f"has {'x' * 10**6} and {'y ' * 10**6}"))
    assert text.startswith(f"has {'x' * 200}... (1000000 characters) and y y")
    assert len(text) < 3100


def test_a_person_s_interrupt_in_a_hook_stays_one(fake_site: FakeSite) -> None:
    strategy = bad(fake_site, "adapter", "", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        strategy.adapter(CONFIG, TARGET)


@pytest.mark.parametrize(("body", "told"), [("0 / 0", "ZeroDivisionError"), ("-1.0", "not -1.0")])
def test_a_schedule_that_fails_in_a_step_is_told(fake_site: FakeSite, body: str, told: str) -> None:
    strategy = bad(fake_site, "schedule", "", f"return lambda progress: {body}")
    with pytest.raises(PluginError, match=r"^specforge-bad 0\.1\.0, specforge_schedule: ") as error:
        strategy.schedule(TrainConfig())(0.5)
    assert told in str(error.value)


@pytest.mark.parametrize("returned", ["3", "dict", "StrategyConfig(name='x')"])
def test_a_plugin_s_section_is_a_model(fake_site: FakeSite, returned: str) -> None:
    source = f"""
    from specforge_core import hookimpl
    from specforge_core.config import StrategyConfig
    @hookimpl
    def specforge_plugin_config(): return {returned}
    """
    group = {"specforge.plugins": {"acme": "acme_plugin"}}
    fake_site.dist("acme-plugin", "0.3", group, module="acme_plugin", source=source)
    strategy = Strategy.load("linear", using=frozenset({"acme"}))
    message = (
        r"^acme-plugin 0\.3, specforge_plugin_config: returned \w+, expected a subclass of Sec"
    )
    with pytest.raises(PluginError, match=message):
        strategy.plugin_configs()


@pytest.mark.parametrize(
    ("hook", "returned", "expected"),
    [
        ("adapter", "Text()", "str, expected an object with a CaptureSpec"),
        ("conversations", "3", "int, expected an object with '__iter__'"),
        ("conversations", "'text'", "str, expected rows to go through"),
        ("conversations", "{'messages': []}", "dict, expected rows to go through"),
        ("draft", "Draft(model=3)", "Draft with model 3, expected a module"),
        (
            "draft",
            "Draft(model=torch.nn.Identity())",
            "Identity, expected a model with parameters that are trained",
        ),
        ("optimizers", "object()", "object, expected a list of optimizers"),
        ("optimizers", "step", "function, expected a list of optimizers"),
        ("optimizers", "[3]", "int, expected an object with 'param_groups'"),
        ("verify_capture", "3", "int, expected a list of Problem"),
        ("config", "3", "int, expected a subclass of StrategyConfig"),
        ("config", "dict", "type, expected a subclass of StrategyConfig"),
        ("adapter", "'text'", "str, expected an object with 'spec'"),
        ("target_engine", "3", "int, expected an object with 'info'"),
        ("reader", "3", "int, expected an object with '__len__'"),
        ("transform", "3", "int, expected a function"),
        ("collate", "[]", "list, expected a function"),
        ("draft", "torch.nn.Linear(1, 1)", "Linear, expected Draft"),
        ("train_step", "'text'", "str, expected a function"),
        ("schedule", "0.5", "float, expected a function"),
        ("proposer", "step", "function, expected an object with 'start'"),
        ("export", "{}", "dict, expected Export"),
        ("verify_capture", "['it is bad']", "str, expected a list of Problem"),
    ],
)
def test_a_wrong_type_is_told_with_what_was_expected(
    fake_site: FakeSite, hook: str, returned: str, expected: str
) -> None:
    strategy = bad(fake_site, hook, "", f"return {returned}")
    with pytest.raises(PluginError) as error:
        getattr(strategy, hook)(*CALLS[hook])
    told = f"specforge-bad 0.1.0, specforge_{hook}: returned {expected}"
    assert str(error.value).startswith(told)


def test_a_sample_that_is_verified_keeps_its_tensors(fake_site: FakeSite) -> None:
    strategy = bad(fake_site, "verify_capture", "sample", "sample.clear()")
    sample = {"hidden": torch.ones(2)}
    strategy.verify_capture(CONFIG, TARGET, SPEC, sample, None)
    assert sample.keys() == {"hidden"}


@pytest.mark.parametrize("hook", ["adapter", "draft", "train_step"])
def test_a_required_hook_that_returns_nothing_is_named(fake_site: FakeSite, hook: str) -> None:
    strategy = bad(fake_site, hook, "", "return None")
    with pytest.raises(
        PluginError, match=f"specforge-bad 0.1.0, specforge_{hook}: returned nothing"
    ):
        getattr(strategy, hook)(*CALLS[hook])


def test_a_cross_cutting_plugin_is_blamed_for_its_own_error(fake_site: FakeSite) -> None:
    source = """
    from specforge_core import hookimpl
    @hookimpl(wrapper=True)
    def specforge_train_step(config):
        step = yield
        return step.absent
    """
    group = {"specforge.plugins": {"wraps": "acme_wraps"}}
    fake_site.dist("acme-wraps", "0.3", group, module="acme_wraps", source=source)
    strategy = Strategy.load("linear")
    with pytest.raises(PluginError, match=r"^acme-wraps 0\.3, specforge_train_step: AttributeErr"):
        strategy.train_step(CONFIG)


@pytest.mark.parametrize(("name", "package"), [("adamw", "specforge-core"), ("sgd", "acme-one")])
def test_what_torch_raises_is_of_the_package_that_returned_it(
    fake_site: FakeSite, name: str, package: str
) -> None:
    source = """
    import torch
    from specforge_core import hookimpl
    @hookimpl
    def specforge_optimizers(train, draft):
        if train.optimizer == "sgd": return [torch.optim.SGD(draft.model.parameters())]
    """
    for who, body in (("one", source), ("two", source.replace('"sgd"', '"other"'))):
        group = {"specforge.plugins": {who: f"acme_{who}"}}
        fake_site.dist(f"acme-{who}", "0.3", group, module=f"acme_{who}", source=body)
    (optimizer, *_) = Strategy.load("linear").optimizers(TrainConfig(optimizer=name), DRAFT)
    with pytest.raises(PluginError, match=f"^{package} [0-9.]+, specforge_optimizers: "):
        optimizer.load_state_dict({"param_groups": [], "state": {}})


def test_an_error_meant_for_the_user_stays_as_it_is(fake_site: FakeSite) -> None:
    text = "this checkpoint does not fit. Try: another"
    strategy = bad(fake_site, "draft", "", f"raise CheckpointError({text!r})")
    with pytest.raises(CheckpointError) as error:
        strategy.draft(CONFIG, TARGET, None)
    assert str(error.value) == text


def test_a_default_argument_and_a_misspelled_hook_are_refused(fake_site: FakeSite) -> None:
    fake_site.strategy("lax", BASE + "\n@hookimpl\ndef specforge_draft(target=None): ...\n")
    with pytest.raises(PluginError, match="specforge_draft gives a default to target"):
        Strategy.load("lax")
    fake_site.strategy("typo", BASE + "\n@hookimpl\ndef specforge_trian_step(config): ...\n")
    message = "specforge_trian_step, which is no hook, did you mean specforge_train_step"
    with pytest.raises(PluginError, match=message):
        Strategy.load("typo")


def test_a_hook_imported_under_another_name_is_no_hook(fake_site: FakeSite) -> None:
    source = """
    from specforge_linear import specforge_adapter, specforge_draft as inherited
    from specforge_linear import specforge_train_step
    from specforge_core import hookimpl
    @hookimpl
    def specforge_draft(target):
        draft = inherited(target)
        draft.model.mine = True
        return draft
    """
    fake_site.strategy("variant", source)
    assert hasattr(Strategy.load("variant").draft(CONFIG, TARGET, None).model, "mine")
