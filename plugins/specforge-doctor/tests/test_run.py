"""The doctor with a strategy and an engine of its own: engine alone, refusals, what is printed."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from specforge_doctor.report import DoctorReport
from specforge_doctor.run import diagnose
from specforge_doctor.testing import NEAR

from specforge_core.checksums import sealed
from specforge_core.cli import cli
from specforge_core.drafts.load import export_checkpoint
from specforge_core.errors import CheckpointError, ConfigError, RunError
from specforge_core.hookspecs import hookimpl
from specforge_core.load import load_config
from specforge_core.testing.plugin import FakeSite
from specforge_core.testing.predictable import save_predictable_target, write_own_answers
from specforge_core.testing.runs import as_made
from specforge_core.train.run import train
from specforge_core.types import Batch, Draft, Ratio, StepContext, StepOutput

LAYERS = "it reads other layers"
# the linear strategy, whose exports name their layer and can be read back
STRATEGY = """
from specforge_linear import *
from specforge_linear import LinearProposer, train_step as step
from specforge_core import hookimpl
from specforge_core.types import Export

@hookimpl
def specforge_export(config, draft, format):
    if format == "hf":
        return Export(
            config={"layer_ids": [config.layer]},
            weights=draft.model.state_dict(),
            causes={"layer_ids": "it reads other layers", "block_size": "it drafts other blocks"},
            serve={"standin": {"spoken": True}},
        )

@hookimpl
def specforge_import(config, draft, export):
    draft.model.load_state_dict(dict(export.weights))
    return True
"""
# another engine: decodes in this process, and reads what config.json says
ENGINE = """
import torch
from specforge_core import hookimpl
from specforge_core.target.engine import TransformersEngine
from specforge_core.errors import CaptureError
from specforge_core.evaluate.decode import generate, Limits
from specforge_core.drafts.export import read_export
from specforge_core.types import CaptureSpec, NotServed, Sampling, ServedAnswer
from specforge_linear import Head, LinearProposer

class Server:
    name = "stand-in 1.0"
    def __init__(self, target, export):
        found = read_export(export)
        size = found.config.get("block_size", 1)
        if size < target.options.get("min_block", 0):
            raise CaptureError(f"no block of {size} tokens. Try: another")
        self.engine = TransformersEngine.load(target, torch.device("cpu"))
        weights = found.weights
        head = Head(*reversed(weights["weight"].shape))
        head.load_state_dict(dict(weights))
        layer = target.options.get("layer", found.config["layer_ids"][0])
        layer %= self.engine.info.num_layers
        self.spec = CaptureSpec(layers=(layer,), fields={})
        self.proposer = LinearProposer(head, layer)
    def answer(self, prompts, max_new_tokens, eos):
        found = []
        for prompt in prompts:
            greedy = Sampling(temperature=0.0, generator=torch.Generator())
            limits = Limits(max_new_tokens, eos)
            got = generate(
                self.engine.model, self.proposer, self.spec, prompt, limits, greedy
            )
            found.append(
                ServedAnswer(
                    tokens=got.tokens,
                    verifications=got.stats.verifications,
                    emitted=got.stats.emitted,
                )
            )
        return found
    def close(self):
        self.engine.close()

@hookimpl
def specforge_target_engine(target, device):
    if target.engine == "standin":
        return TransformersEngine.load(target, device)

@hookimpl
def specforge_serve(target, export, draft_tokens):
    assert draft_tokens == 1 and export.is_absolute()
    if target.engine == "standin":
        if "refuse" in target.options:
            return NotServed(reason="there is no device")
        return Server(target, export)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files of one test lie after the other's, so that paths in them stay right."""
    return tmp_path_factory.mktemp("doctor") / "place"


@pytest.fixture
def trained(fake_site: FakeSite, place: Path) -> Path:
    """A trained run and its export; made once, and as new for every test."""
    fake_site.strategy("served", STRATEGY)
    group = {"specforge.plugins": {"standin": "specforge_standin"}}
    fake_site.dist("specforge-standin", "1.0", group, module="specforge_standin", source=ENGINE)
    as_made(place, make)
    return place


def make(tmp_path: Path) -> None:
    save_predictable_target(tmp_path / "target", initializer_range=0.2)
    data = write_own_answers(tmp_path / "target", tmp_path / "train.jsonl", 48, length=24)
    held = write_own_answers(tmp_path / "target", tmp_path / "held.jsonl", 8, length=1, seed=7)
    raw: dict[str, Any] = {
        "target": {"path": str(tmp_path / "target"), "dtype": "float32", "engine": "standin"},
        "strategy": {"name": "served"},
        "data": {"train": [str(data)], "validation": 0.1},
        "output_dir": str(tmp_path / "run"),
        "train": {
            **{"max_steps": 80, "batch_size": 8, "learning_rate": 0.03},
            **{"device": "cpu", "compute_dtype": "float32"},
            **{"validate_every": 40, "keep_best": "validation_loss"},
        },
        "eval": {"prompts": {"held": str(held)}, "max_new_tokens": 16},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    train(*load_config(tmp_path / "run.yaml"))
    export_checkpoint(tmp_path / "run", "hf", tmp_path / "export", force=False)


def examine(trained: Path, *overrides: str, **options: Any) -> DoctorReport:
    run, strategy = load_config(trained / "run.yaml", overrides)
    paths = {"draft": trained / "run", "export": trained / "export", **options}
    return diagnose(run, strategy, **paths)


def edit(path: Path, **fields: Any) -> None:
    told = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(sealed(told) if "checksum" in told else told))


@pytest.mark.slow
def test_trainer_reference_and_engine_agree(trained: Path) -> None:
    report = examine(trained)
    assert report.verdict.healthy, report.verdict.message
    assert "the reference and stand-in 1.0 agree" in report.verdict.message
    found = {m.name: m.value for m in report.measurements}
    assert len(found) == 5
    assert found["engine"] == found["reference loop"] == found["reference loop, export"]
    assert found["trainer, simulated"] == pytest.approx(found["draft, at every token"], rel=NEAR)
    assert (found["engine"] or 0) > 1.3
    assert "stand-in 1.0: 8 of 8 answers are the reference's own" in report.notes


@pytest.mark.slow
def test_what_only_the_engine_reads_is_found_by_serving_repaired_copies(trained: Path) -> None:
    edit(trained / "export" / "config.json", layer_ids=[0])
    report = examine(trained)
    loop, served = (pair for pair in report.comparisons if pair.left == "reference loop")
    assert (loop.differs, served.differs) == (False, True)
    assert report.verdict.cause == LAYERS
    assert "the export, served by stand-in 1.0, gets" in report.verdict.message
    assert f"Cause: {LAYERS}: layer_ids is [0], expected [-2]. Try: " in report.verdict.message


@pytest.mark.slow
def test_without_an_engine_such_a_difference_is_an_error_too(trained: Path) -> None:
    edit(trained / "export" / "config.json", layer_ids=[0])
    report = examine(trained, "target.options={refuse: true}")
    assert "no engine was measured: there is no device" in report.notes
    assert report.verdict.cause == LAYERS
    assert "what only an engine reads: layer_ids is [0], expected [-2]" in report.verdict.message


@pytest.mark.slow
def test_an_engine_that_serves_otherwise_is_told_from_a_bad_export(trained: Path) -> None:
    """The engine reads another layer than the one named, and the export is right."""
    report = examine(trained, "target.options={layer: 0}")
    assert (report.verdict.healthy, report.verdict.cause) == (False, None)
    assert "but is exactly what this checkpoint exports: it is served" in report.verdict.message
    assert "Look at the engine's own flags" in report.verdict.message


@pytest.mark.slow
def test_the_export_says_of_which_template_it_is(trained: Path) -> None:
    path = trained / "export" / "provenance.json"
    capture = json.loads(path.read_text())["capture"] | {"chat_template_fingerprint": "0123456789"}
    edit(path, capture=capture, step=7)
    report = examine(trained)
    assert report.verdict.cause == "template"
    assert re.search(r"of the export is .*expected 0123456789", report.verdict.message)
    assert "the export is of step 7, the checkpoint of step 80" in report.notes
    edit(path, capture=[1])
    with pytest.raises(CheckpointError, match=r"export is damaged: .*Export again"):
        examine(trained)


@pytest.mark.slow
def test_a_step_that_simulates_too_much_is_told_from_a_bad_export(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin: Any = importlib.import_module("specforge_served")

    def boast(draft: Draft, batch: Batch, ctx: StepContext) -> StepOutput:
        output: StepOutput = plugin.step(draft, batch, ctx)
        found = output.metrics["acceptance_length"]
        more = {"acceptance_length": Ratio(num=found.num * 1.1, den=found.den)}
        return StepOutput(loss_sum=output.loss_sum, weight=output.weight, metrics=more)

    def specforge_train_step() -> Any:
        return boast

    monkeypatch.setattr(plugin, "specforge_train_step", hookimpl(specforge_train_step))
    report = examine(trained)
    assert (report.verdict.healthy, report.verdict.cause) == (False, None)
    assert "the trainer simulates 1." in report.verdict.message
    found = re.findall(r"\(\+(.*)%; chance explains [01]\..%\): no export", report.verdict.message)
    assert [float(more) for more in found] == [pytest.approx(10, abs=1.1 * 100 * NEAR)]


def test_answers_of_one_token_measure_nothing(trained: Path) -> None:
    with pytest.raises(ConfigError, match="no answer has a second token, so nothing was drafted"):
        examine(trained, "eval.max_new_tokens=1")


@pytest.mark.slow
def test_an_engine_that_fails_on_an_export_is_repaired_as_one_that_accepts_less(
    trained: Path,
) -> None:
    edit(trained / "export" / "config.json", layer_ids=[0], block_size=0)
    report = examine(trained, "target.options={min_block: 1}")
    assert report.verdict.cause == LAYERS
    assert f"is refused (no block of 0 tokens.). Cause: {LAYERS}" in report.verdict.message
    assert "together with it drafts other blocks" in report.verdict.message


def test_few_prompts_are_said_to_be_few(trained: Path) -> None:
    with pytest.raises(ConfigError, match=r"1 prompt says nothing of chance.*eval\.limit=50"):
        examine(trained, "eval.limit=1")


def test_an_export_is_no_checkpoint(trained: Path) -> None:
    with pytest.raises(ConfigError, match="is an exported draft, and the doctor compares one"):
        examine(trained, draft=trained / "export")
    with pytest.raises(CheckpointError, match="is not an exported draft"):
        examine(trained, export=trained / "run")


def test_a_checkpoint_that_was_made_otherwise_is_refused(trained: Path) -> None:
    with pytest.raises(CheckpointError, match=r"strategy\.layer: -2 in it, 0 in this run"):
        examine(trained, "strategy.layer=0")


@pytest.mark.slow
def test_an_export_of_another_tool_needs_its_format(trained: Path) -> None:
    (trained / "export" / "provenance.json").unlink()
    with pytest.raises(ConfigError, match="does not say in which format it was exported"):
        examine(trained)
    assert examine(trained, format="hf").verdict.healthy


@pytest.mark.slow
def test_the_command_prints_a_table_and_fails_with_one_message(trained: Path) -> None:
    """Of the best checkpoint, as `export` and `eval` take it."""
    config, best = ["-c", str(trained / "run.yaml")], f"{trained / 'run'}@best"
    export = ["export", "--checkpoint", best, "-o", str(trained / "export"), "--force"]
    for command in (export, ["eval", *config, "--draft", best, "eval.limit=1"]):
        done = CliRunner().invoke(cli, command)
        assert done.exit_code == 0, done.exception
    command = ["doctor", *config, "--draft", best, "--export", str(trained / "export")]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.exception
    assert "reference loop, export" in done.stdout
    assert "agree on what is accepted" in done.stdout
    edit(trained / "export" / "config.json", layer_ids=[0])
    failed = CliRunner().invoke(cli, [*command, "--json"])
    report = json.loads(failed.stdout)
    assert report == json.loads((trained / "run" / "doctor" / "report.json").read_text())
    assert (report["healthy"], report["cause"]) == (False, LAYERS)
    assert json.loads((trained / "run/doctor/report-1.json").read_text())["healthy"] is True
    assert (type(failed.exception), str(failed.exception)) == (RunError, report["message"])
