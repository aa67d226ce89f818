from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from specforge_core.capture.identity import capture_identity, check_identity, target_fingerprint
from specforge_core.capture.manifest import CaptureIdentity
from specforge_core.config import RunConfig, StrategyConfig, TargetConfig
from specforge_core.errors import CaptureError
from specforge_core.strategy import Strategy
from specforge_core.target.info import load_target_info
from specforge_core.target.tokenizer import load_tokenizer
from specforge_core.testing.plugin import FakeSite
from specforge_core.testing.toy import save_toy_target
from specforge_core.types import CaptureSpec, Field

SPEC = CaptureSpec(layers=(1, 3), fields={"hidden": Field(shape=(None, 64), dtype="bfloat16")})
SOURCE = """
    from specforge_core import hookimpl

    @hookimpl
    def specforge_adapter(): ...

    @hookimpl
    def specforge_draft(): ...

    @hookimpl
    def specforge_train_step(): ...
"""


@pytest.fixture
def strategy(env: FakeSite) -> Strategy:
    env.strategy("tiny", SOURCE)
    return Strategy.load("tiny")


def identity(target: Path, strategy: Strategy, spec: CaptureSpec = SPEC) -> CaptureIdentity:
    config = TargetConfig(path=str(target))
    run = RunConfig(target=config, strategy=StrategyConfig(name=strategy.name))
    tokenizer = load_tokenizer(config)
    return capture_identity(run, strategy, load_target_info(config), spec, tokenizer)


@pytest.fixture
def copy(toy_target: Path, tmp_path: Path) -> Path:
    return shutil.copytree(toy_target, tmp_path / "copy")


def test_an_identity_says_what_was_captured_and_by_what(toy_target: Path, strategy: Strategy):
    found = identity(toy_target, strategy)
    assert found.strategy_package == "specforge-tiny 0.1.0"
    assert (found.hidden_size, found.num_layers, found.vocab_size) == (32, 6, 260)
    assert found.spec() == SPEC
    check_identity(found, identity(toy_target, strategy), Path("d"))


def test_where_and_in_how_many_files_the_target_is_does_not_matter(
    toy_target: Path, copy: Path, strategy: Strategy, tmp_path: Path
):
    check_identity(identity(toy_target, strategy), identity(copy, strategy), Path("d"))
    model = AutoModelForCausalLM.from_pretrained(toy_target)
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    shutil.copy(toy_target / "config.json", tmp_path / "parts")
    fingerprints = [
        target_fingerprint(load_target_info(TargetConfig(path=str(path))))
        for path in (toy_target, tmp_path / "parts")
    ]
    assert fingerprints[0] == fingerprints[1]


def refused(found: CaptureIdentity, expected: CaptureIdentity) -> str:
    with pytest.raises(CaptureError) as error:
        check_identity(found, expected, Path("some/capture"))
    text = str(error.value)
    assert text.startswith("the capture in some/capture does not fit this run:")
    assert "into another data.capture_dir" in text.splitlines()[-1]
    return text


def test_other_weights_are_refused(toy_target: Path, strategy: Strategy, tmp_path: Path):
    save_toy_target(tmp_path / "other", seed=1)
    text = refused(identity(toy_target, strategy), identity(tmp_path / "other", strategy))
    assert f"target's weights or config: {toy_target} (" in text
    assert f"in the capture, {tmp_path / 'other'} (" in text
    assert "Set target.path and target.revision" in text


def test_one_changed_matrix_is_noticed(toy_target: Path, copy: Path, strategy: Strategy):
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.4.mlp.up_proj.weight"] += 1e-3
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert "weights" in refused(identity(toy_target, strategy), identity(copy, strategy))


def test_a_changed_config_is_noticed_and_a_version_stamp_is_not(
    toy_target: Path, copy: Path, strategy: Strategy
):
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**raw, "transformers_version": "5.0.0"}))
    check_identity(identity(toy_target, strategy), identity(copy, strategy), Path("d"))
    (copy / "config.json").write_text(json.dumps({**raw, "rms_norm_eps": 0.01}))
    assert "config" in refused(identity(toy_target, strategy), identity(copy, strategy))


def test_another_chat_template_is_refused(toy_target: Path, copy: Path, strategy: Strategy):
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|> "))
    text = refused(identity(toy_target, strategy), identity(copy, strategy))
    assert "chat template or data.chat_template_kwargs" in text
    assert "tokenizer:" not in text


def test_another_tokenizer_is_refused(toy_target: Path, copy: Path, strategy: Strategy):
    path = copy / "tokenizer.json"
    raw = json.loads(path.read_text())
    vocab = raw["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(raw))
    assert "tokenizer:" in refused(identity(toy_target, strategy), identity(copy, strategy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (1, 4)}, "captured layers: [1, 3] in the capture, [1, 4] in this run"),
        ({"final": "post_norm"}, "final hidden state: none in the capture, post_norm in this"),
        ({"spec_version": 2}, "version of the strategy's capture format: 1 in the capture, 2 in"),
        ({"next_tokens": True}, "target's next tokens: False in the capture, True in this run"),
        ({"logsumexp": True}, "target's log-sum-exp: False in the capture, True in this run"),
        (
            {"fields": {"hidden": ((None, 64), "float32")}},
            "stored fields: {'hidden': 'bfloat16 [None, 64]'} in the capture, {'hidden': 'float32",
        ),
        ({"max_length": 4096}, "data.max_length: 2048 in the capture, 4096 in this run"),
    ],
)
def test_each_difference_is_named_with_both_values(
    toy_target: Path, strategy: Strategy, change: dict[str, object], message: str
):
    found = identity(toy_target, strategy)
    assert f"\n  {message}" in refused(found, found.model_copy(update=change))


@pytest.mark.parametrize("more", [{"final": "post_norm"}, {"next_tokens": True, "fields": {}}])
def test_a_method_that_asks_for_more_than_was_captured_is_told_to_capture_with_its_own_config(
    toy_target: Path, strategy: Strategy, more: dict[str, object]
):
    found = identity(toy_target, strategy)
    last = refused(found, found.model_copy(update=more)).splitlines()[-1]
    assert last.startswith("Capture again with this run's config into another data.capture_dir")
    assert "methods that ask for less of the same layers train on it, too" in last


def test_what_is_only_for_information_may_differ(toy_target: Path, strategy: Strategy):
    found = identity(toy_target, strategy)
    other = {
        "target": "elsewhere",
        "core_version": "9",
        "strategy": "another",  # that asks for the same
        "strategy_package": "x 2",
    }
    check_identity(found, found.model_copy(update=other), Path("d"))


@pytest.mark.parametrize(
    "more",
    [
        {"final": "pre_norm"},
        {"next_tokens": True, "logsumexp": True},
        {"fields": {"hidden": ((None, 64), "bfloat16"), "next": ((None,), "int64")}},
        {"strategy": "another", "spec_version": 2},
    ],
)
def test_a_capture_may_hold_more_than_a_run_asks_for_but_is_resumed_with_the_same(
    toy_target: Path, strategy: Strategy, more: dict[str, object]
):
    wanted = identity(toy_target, strategy)
    found = wanted.model_copy(update=more)
    check_identity(found, wanted, Path("d"))
    with pytest.raises(CaptureError, match="does not fit this run"):
        check_identity(found, wanted, Path("d"), resume=True)


def test_a_method_of_the_final_state_alone_reads_a_capture_of_any_layers(
    toy_target: Path, strategy: Strategy
):
    final = {"final_state": Field(shape=(None, 32), dtype="bfloat16")}
    asked = CaptureSpec(layers=(), final="post_norm", fields=final)
    more = CaptureSpec(layers=(1, 3), final="post_norm", fields={**SPEC.fields, **final})
    found, wanted = (identity(toy_target, strategy, spec) for spec in (more, asked))
    check_identity(found, wanted, Path("d"))
    with pytest.raises(CaptureError, match=r"captured layers: \[1, 3\]"):
        check_identity(found, wanted, Path("d"), resume=True)
    with pytest.raises(CaptureError, match="captured layers"):
        check_identity(wanted, found, Path("d"))


def test_of_the_fields_those_that_differ_are_told(toy_target: Path, strategy: Strategy):
    found = identity(toy_target, strategy)
    same, one, two = ((None,), "int64"), ((None,), "uint8"), ((None,), "int64")
    capture = found.model_copy(update={"fields": {"input_ids": same, "loss_mask": one}})
    run = found.model_copy(update={"fields": {"input_ids": same, "loss_mask": two}})
    with pytest.raises(CaptureError) as error:
        check_identity(capture, run, Path("d"))
    assert "{'loss_mask': 'uint8 [None]'} in the capture" in str(error.value)
    assert "input_ids" not in str(error.value)


def test_shorter_samples_may_be_trained_on_but_not_mixed_into_a_capture(
    toy_target: Path, strategy: Strategy
):
    found = identity(toy_target, strategy)
    shorter = found.model_copy(update={"max_length": 64})
    check_identity(found, shorter, Path("d"))
    with pytest.raises(CaptureError, match=r"data\.max_length: 2048 in the capture, 64 in this"):
        check_identity(found, shorter, Path("d"), resume=True)


def test_fingerprints_are_shown_as_far_as_they_differ(toy_target: Path, strategy: Strategy):
    own = identity(toy_target, strategy)
    last = "1" if own.tokenizer_fingerprint.endswith("0") else "0"
    other = own.tokenizer_fingerprint[:-1] + last
    text = refused(own.model_copy(update={"tokenizer_fingerprint": other}), own)
    assert f"{other} in the capture, {own.tokenizer_fingerprint} in this run" in text
