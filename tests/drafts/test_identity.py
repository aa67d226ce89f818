"""What a draft was made of is compared wherever it is read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from specforge_core.checksums import sealed
from specforge_core.cli import cli
from specforge_core.drafts.checkpoint import CHECKSUMS, STATE, find
from specforge_core.drafts.load import restore
from specforge_core.drafts.verify import verify_draft
from specforge_core.errors import CheckpointError
from specforge_core.testing.plugin import FakeSite
from specforge_core.testing.runs import as_made, load

from .read_back import METHOD, make, uses

pytest.importorskip("specforge_linear", reason="the linear example is not installed")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files of one test lie after the other's, so that paths in them stay right."""
    return tmp_path_factory.mktemp("identity") / "place"


@pytest.fixture
def config(place: Path, env: FakeSite) -> Path:
    """A finished run of two steps, its export, and targets that differ a little."""
    env.strategy("method", METHOD)
    as_made(place, make)
    return place / "run.yaml"


REFUSED = [
    (
        "strategy.layout=next",
        "strategy.layout: same in it, next in this run",
        "strategy.layout=same",
    ),
    ("strategy.layer=2", "strategy.layer: -2 in it, 2 in this run", "strategy.layer=-2"),
    ("strategy.mask=7", "strategy.mask: 259 in it, 7 in this run", "strategy.mask=259"),
]
SAID_AT_START = [
    ("strategy.decay=0.25", "strategy.decay: 0.5 in it, 0.25 in this run", "strategy.decay=0.5"),
    (
        "target.path={}/seed",
        r"the target's weights or config: .*/target \(\w+\) in it",
        "target.path",
    ),
    (
        "target.path={}/template",
        "the chat template or data.chat_template_kwargs: ",
        "the chat templ",
    ),
    ("target.path={}/tokenizer", r"the tokenizer: \w+ in it, \w+ in this run", "the tokenizer it"),
    ("data.chat_template_kwargs={x: 1}", "the chat template or data.chat_template_kwargs", "with"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("option", "message", "remedy"), [*REFUSED, *SAID_AT_START])
def test_what_made_a_draft_is_compared_wherever_it_is_read(
    config: Path,
    option: str,
    message: str,
    remedy: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    option = option.replace("{}", str(config.parent))
    said = message in [m for _, m, _ in SAID_AT_START]
    for name, use in uses(config).items():
        if said and name == "start":
            use(option)
            assert "were made otherwise: " in capsys.readouterr().err
            continue
        with pytest.raises(CheckpointError, match=rf"{message}(.|\n)*\nTry: .*{remedy}") as found:
            use(option)
        assert "made with other settings than this run" in str(found.value)
        resumed = said and name in ("resume", "offline")
        assert resumed == ("or start from its weights: train.init_from=" in str(found.value))
    assert not (config.parent / "out").exists()


def test_what_options_came_to_is_compared_with_another_target_too(config: Path) -> None:
    begin = uses(config)["start"]
    with pytest.raises(CheckpointError, match=r"eps: 1e-06 in it, 0\.25 in this run"):
        begin(f"target.path={config.parent / 'eps'}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        (
            "strategy.chunk=2",
            "target.dtype=bfloat16",
            "target.batch_tokens=64",
            "train.learning_rate=1e-5",
            "train.batch_size=3",
            "train.accumulate=1",
        ),
        (
            "strategy.mask=259",  # what it came to by itself
            "train.weight_decay=0.3",
            "train.schedule=constant",
            "train.warmup_ratio=0.5",
            "train.keep=1",
            "train.save_every=1",
            "train.log_every=2",
            "data.max_length=64",
        ),
    ],
)
def test_what_may_change_may(config: Path, options: tuple[str, ...]) -> None:
    """Of what must not, a message names each alone: together they prove the same."""
    for use in uses(config).values():
        use(*options)


@pytest.mark.slow
def test_a_target_that_moved_is_the_same(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = config.parent
    moved = f"target.path={path / 'moved'}"
    (path / "target").rename(path / "moved")
    for name, use in uses(config).items():
        if name != "offline":
            use(moved)
    monkeypatch.chdir(path / "moved")
    uses(config)["export"]("target.path=.")


def test_another_seed_would_be_another_order_of_the_samples(config: Path) -> None:
    with pytest.raises(CheckpointError, match=r"train\.seed=0, this run has train\.seed=1"):
        uses(config)["resume"]("train.seed=1")
    for name in ("start", "evaluate", "export"):
        uses(config)[name]("train.seed=1")


def test_options_of_another_version_are_told_of(config: Path) -> None:
    path = find(config.parent / "run") / STATE
    path.with_name(CHECKSUMS).unlink()
    state = json.loads(path.read_text())
    new = state["config"]["strategy"].pop("chunk")  # an option that came later is at its default
    path.write_text(json.dumps(state))
    uses(config)["evaluate"]()
    state["config"]["strategy"] |= {"chunk": new, "shift": 3}
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"does not have: shift is unknown\. Install the ver"):
        uses(config)["evaluate"]()


@pytest.mark.parametrize(
    "change",
    [{"capture": {}}, {"config": 3}, {"config": {"strategy": []}}, {"resolved": 7}, {"capture": 1}],
)
def test_a_provenance_that_was_edited_is_damaged(config: Path, change: dict[str, object]) -> None:
    path = config.parent / "export" / "provenance.json"
    told = json.loads(path.read_text()) | change
    path.write_text(json.dumps(sealed(told)))
    with pytest.raises(CheckpointError, match=r"export is damaged: .*Export again"):
        uses(config)["evaluate_export"]()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "next"}, "says layout 'next', and 'same' was written"),
        ({"chunk": 8.0}, r"says chunk 8\.0, and 8 was written"),
        ({"chunk": None}, "says chunk None, and 8 was written"),
        ({"nested": {"a": {"b": True}}}, r"says nested\.a\.b True, and 1 was written"),
        ({"nested": {"a": {"b": 2}}}, r"says nested\.a\.b 2, and 1 was written"),
        ({"nested": {"a": {"b": 1, "c": 0}}}, r"says nested\.a\.c 0, and nothing was written"),
        ({"nested": []}, r"says nested \[\], and {'a': {'b': 1}} was written"),
        ({"hidden_act": "gelu"}, "says hidden_act 'gelu', and nothing was written"),
    ],
)
def test_a_config_json_that_was_edited_is_named_with_both_values(
    config: Path, change: dict[str, object], message: str
) -> None:
    export = config.parent / "export"
    told = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(told | change))
    for use in (uses(config)["evaluate_export"], lambda: verify_draft(export)):
        with pytest.raises(CheckpointError, match=rf"config\.json of the export {message} with"):
            use()
    provenance = json.loads((export / "provenance.json").read_text())
    (export / "provenance.json").write_text(json.dumps(sealed(provenance | {"written": 3})))
    with pytest.raises(CheckpointError, match="written is no object"):
        verify_draft(export)


def test_an_export_of_another_tool_is_left_to_the_strategy(config: Path) -> None:
    (config.parent / "export" / "provenance.json").unlink()
    uses(config)["evaluate_export"]("strategy.layout=next")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_export_that_is_not_finite_is_refused(config: Path, bad: float) -> None:
    from safetensors.torch import load_file, save_file

    file = config.parent / "export" / "model.safetensors"
    weights = load_file(file)
    weights["bias"][3] = bad
    save_file(weights, file)
    told = file.with_name("provenance.json")  # with checksums the file is damaged before that
    told.write_text(json.dumps(sealed(json.loads(told.read_text()) | {"checksums": {}})))
    with pytest.raises(CheckpointError, match=r"tensor 'bias' of .*export holds values that are n"):
        uses(config)["evaluate_export"]()


REMOTE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import LlamaConfig
class Remote(LlamaConfig):
    model_type = "remote_llama"
"""


@pytest.mark.slow
def test_a_checkpoint_decides_about_no_code_plugin_secret_or_path(
    config: Path,
) -> None:
    tmp_path = config.parent
    target, marker = tmp_path / "remote", tmp_path / "ran"
    shutil.copytree(tmp_path / "target", target)
    (target / "remote.py").write_text(REMOTE.format(marker=str(marker)))
    raw = json.loads((target / "config.json").read_text())
    raw |= {"model_type": "remote_llama", "auto_map": {"AutoConfig": "remote.Remote"}}
    (target / "config.json").write_text(json.dumps(raw))
    path = find(tmp_path / "run") / STATE
    state = json.loads(path.read_text())
    state["config"]["target"] |= {
        "path": str(target),
        "trust_remote_code": True,
        "engine": "evil",
        "options": {"urls": ["http://127.0.0.1:1"]},
    }
    state["config"] |= {"plugins": {"evil": {}}, "output_dir": "/nowhere"}
    path.write_text(json.dumps(state))
    path.with_name(CHECKSUMS).unlink()  # who writes the one may write the other
    done = CliRunner().invoke(
        cli, ["export", "--checkpoint", str(tmp_path / "run"), "-o", str(tmp_path / "out")]
    )
    assert "Try: target.trust_remote_code=true, if you trust" in str(done.exception)
    assert not marker.exists()
    with pytest.raises(CheckpointError, match="the target's weights or config"):
        uses(config)["export"]("target.trust_remote_code=true")
    assert marker.exists()


def test_export_takes_a_config_and_overrides(config: Path) -> None:
    tmp_path = config.parent
    where = ["export", "--checkpoint", str(tmp_path / "run"), "--force", "-o", str(tmp_path / "o")]
    for options in ([], ["-c", str(config)]):
        done = CliRunner().invoke(cli, [*where, *options, "strategy.chunk=3"])
        assert done.exit_code == 0, done.exception
        assert json.loads((tmp_path / "o/config.json").read_text())["chunk"] == 3
    stored = json.loads((tmp_path / "o/provenance.json").read_text())
    assert stored["config"]["strategy"]["chunk"] == 3
    assert stored["resolved"] == {"eps": 1e-06, "mask": 259}


def test_the_weights_are_what_was_trained(config: Path) -> None:
    one = restore(*load(config), config.parent / "run").draft.model.state_dict()
    other = restore(*load(config), config.parent / "export").draft.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
