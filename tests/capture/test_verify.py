from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from specforge_core.capture.identity import target_fingerprint
from specforge_core.capture.job import run_capture
from specforge_core.capture.manifest import CaptureManifest, Shard
from specforge_core.capture.verify import verify_directory
from specforge_core.drafts.verify import verify
from specforge_core.errors import CaptureError, CheckpointError
from specforge_core.load import load_config
from specforge_core.target.info import load_target_info
from specforge_core.target.tokenizer import load_tokenizer, template_fingerprint
from specforge_core.testing.plugin import FakeSite
from specforge_core.testing.toy import save_toy_target, write_conversations

from ..captured import SOURCE, WRONG


@pytest.fixture
def config(env: FakeSite, tmp_path: Path, toy_target: Path) -> Path:
    env.strategy("tiny", SOURCE)
    target = shutil.copytree(toy_target, tmp_path / "target")
    data = write_conversations(tmp_path / "train.jsonl", 12)
    raw = {
        "target": {"path": str(target), "batch_tokens": 256, "device": "cpu"},
        "strategy": {"name": "tiny"},
        "data": {"train": [str(data)], "capture_dir": str(tmp_path / "capture")},
        "capture": {"shard_tokens": 300},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "capture"


@pytest.fixture
def directory(config: Path, kept: Path, tmp_path: Path) -> Path:
    """A complete capture; made once, and copied for every test."""
    if not kept.exists():
        run_capture(*load_config(config, (f"data.capture_dir={kept}",)))
    return shutil.copytree(kept, tmp_path / "capture")


def refused(config: Path, directory: Path, *overrides: str, recapture: int = 3) -> str:
    with pytest.raises(CaptureError) as error:
        verify_directory(directory, *load_config(config, overrides), recapture)
    return str(error.value)


def edit(directory: Path, shard: int, field: str, row: int | slice, value: float) -> None:
    """Change rows of a stored field, in a shard that is of a time without checksums."""
    path = directory / f"shard-{shard:05d}.safetensors"
    columns = load_file(path)
    columns[field][row] = value
    columns.pop("_checksums", None)
    save_file(columns, path)
    manifest = CaptureManifest.read(directory)
    new = {"num_bytes": path.stat().st_size, "checksum": None, "table_checksum": None}
    fixed = [s.model_copy(update=new) if s.file == path.name else s for s in manifest.shards]
    manifest.model_copy(update={"shards": tuple(fixed)}).write(directory)


def disguise(directory: Path, **changes: object) -> None:
    """Make the manifest claim something else."""
    manifest = CaptureManifest.read(directory)
    identity = manifest.identity.model_copy(update=changes)
    manifest.model_copy(update={"identity": identity}).write(directory)


def test_a_good_capture_verifies_with_and_without_its_target(config: Path, directory: Path):
    report = verify_directory(directory, None, None, 3)
    assert str(report) == f"{directory}: 12 samples are as they should be"
    report = verify_directory(directory, *load_config(config), 3)
    assert str(report).endswith(
        "12 samples are as they should be, 3 of them captured again and equal"
    )


def test_an_unfinished_capture_is_verified_as_far_as_it_is(config: Path, directory: Path):
    manifest = CaptureManifest.read(directory)
    partly = {"complete": False, "shards": manifest.shards[:1]}
    manifest.model_copy(update=partly).write(directory)
    report = verify_directory(directory, *load_config(config), 99)
    assert report.num_recaptured == report.num_samples == manifest.shards[0].num_samples
    assert str(report).endswith("; the capture is not complete yet")


def test_all_that_lies_in_a_directory_is_verified(config: Path, directory: Path):
    shutil.copytree(directory, directory / "validation")
    step = directory / "checkpoints/step-00000003"
    step.mkdir(parents=True)
    (step / "state.json").touch()
    shutil.copy(directory / "token_counts.safetensors", step)
    told = list(verify(directory, *load_config(config), 2))
    assert told[0].startswith(f"{directory}: no checksums are with 1 of 1 checkpoint")
    assert told[1].endswith("2 of them captured again and equal")
    assert told[2] == f"{directory}/validation: 12 samples are as they should be"
    for folder in (directory / "validation", directory):  # the one read last is damaged first
        shard = folder / "shard-00000.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
        with pytest.raises(CaptureError, match=f"in {folder} must not be trained on"):
            list(verify(directory, None, None, 0))


def test_a_folder_of_what_can_be_verified_is_told_from_one_of_nothing(tmp_path: Path):
    (tmp_path / "run/checkpoints/step-00000003").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-00000003/state.json").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").touch()
    for name, message in {
        "run/checkpoints": "Try the run that it is of: .*/run$",
        "model": r"model has no provenance\.json: there are no checksums",
        "absent": "does not exist",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            list(verify(tmp_path / name, None, None, 0))


def test_damaged_values_are_found_without_a_target(directory: Path):
    edit(directory, 1, "hidden", 0, float("inf"))
    edit(directory, 1, "input_ids", 1, 999)
    with pytest.raises(CaptureError) as error:
        verify_directory(directory, None, None, 0)
    text = str(error.value)
    assert text.startswith(f"the capture in {directory} must not be trained on:")
    assert re.search(r"sample \d+ \(prompt \d+\), field 'hidden': holds NaN or infinity", text)
    assert re.search(r"sample \d+ \(prompt \d+\), field 'input_ids': has values \d+ to 999", text)
    assert text.endswith("specforge capture -c RUN.yaml data.capture_dir=EMPTY_DIRECTORY")


def test_a_truncated_shard_is_found(config: Path, directory: Path):
    os.truncate(directory / "shard-00001.safetensors", 1000)
    assert re.search(
        r"shard-00001\.safetensors has 1000 bytes: it is truncated", refused(config, directory)
    )


def test_a_prompt_stored_twice_and_one_left_out_are_found(directory: Path):
    manifest = CaptureManifest.read(directory)
    first, last = manifest.shards[0], manifest.shards[-1]
    shutil.copy(directory / first.file, directory / "shard-00009.safetensors")
    double = Shard(**{**first.model_dump(), "file": "shard-00009.safetensors"})
    doubled = (*manifest.shards, double)
    manifest.model_copy(update={"shards": doubled, "num_prompts": None}).write(directory)
    with pytest.raises(CaptureError, match=r"prompt \d+ was stored or skipped 2 times"):
        verify_directory(directory, None, None, 0)
    manifest.model_copy(update={"shards": manifest.shards[:-1]}).write(directory)
    rest = 12 - last.num_samples
    with pytest.raises(CaptureError, match=f"{rest} samples and 0 skipped .* make 12 prompts"):
        verify_directory(directory, None, None, 0)


@pytest.mark.parametrize(
    ("step", "final", "message"),
    [
        (1, "spec.final", "values: layer 1 looks like the output of layer 2"),
        (-1, "spec.final", "values: layer 3 looks like the output of layer 2"),
        (0, '"pre_norm"', "values: the final state looks like pre_norm, not post_norm"),
    ],
)
def test_what_a_wrong_engine_captured_is_found(
    config: Path, env: FakeSite, tmp_path: Path, step: int, final: str, message: str
):
    source = WRONG.replace("STEP", str(step)).replace("FINAL", final)
    group = {"specforge.plugins": {"wrong": "wrong_engine"}}
    env.dist("wrong-engine", "0.1.0", group, module="wrong_engine", source=source)
    run_capture(*load_config(config, ("target.engine=wrong",)))
    # the same mistake again looks right, so what is compared with must be another engine
    verify_directory(tmp_path / "capture", *load_config(config, ("target.engine=wrong",)), 2)
    verify_directory(tmp_path / "capture", None, None, 0)
    assert message in refused(config, tmp_path / "capture")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strategy.layers=[2,4]", "captured layers: [1, 3] in the capture, [2, 4] in this run"),
        (
            "strategy.final=pre_norm",
            "final hidden state: post_norm in the capture, pre_norm in this run",
        ),
    ],
)
def test_other_options_of_the_strategy_are_found(
    config: Path, directory: Path, override: str, message: str
):
    assert message in refused(config, directory, override)


@pytest.mark.parametrize("more", [(), ("data.train=[]",)])
def test_a_capture_of_more_fields_is_verified_as_far_as_they_are_asked_for(
    config: Path, directory: Path, more: tuple[str, ...]
):
    less = load_config(config, ("strategy.keep_ids=false", *more))
    assert verify_directory(directory, *less, 3).num_recaptured == 3


def test_a_manifest_that_claims_other_layers_is_found_by_the_values(config: Path, directory: Path):
    disguise(directory, layers=(2, 3))
    text = refused(config, directory, "strategy.layers=[2,3]")
    assert "values: layer 2 looks like the output of layer 1" in text
    assert "layer 3" not in text


def test_a_manifest_that_claims_another_final_state_is_found_by_the_values(
    config: Path, directory: Path
):
    disguise(directory, final="pre_norm")
    text = refused(config, directory, "strategy.final=pre_norm")
    assert "values: the final state looks like post_norm, not pre_norm" in text


def test_another_revision_is_found_by_its_fingerprint_and_by_the_values(
    config: Path, directory: Path, tmp_path: Path
):
    save_toy_target(tmp_path / "target", seed=1)
    text = refused(config, directory)
    assert "target's weights or config: " in text
    run, _ = load_config(config)
    disguise(directory, target_fingerprint=target_fingerprint(load_target_info(run.target)))
    assert "values: " in refused(config, directory)


def test_another_chat_template_is_found_by_its_fingerprint_and_by_the_tokens(
    config: Path, directory: Path, tmp_path: Path
):
    path = tmp_path / "target" / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>", "<|im_start|> "))
    text = refused(config, directory)
    assert "chat template or data.chat_template_kwargs: " in text
    run, _ = load_config(config)
    now = template_fingerprint(load_tokenizer(run.target), {})
    disguise(directory, chat_template_fingerprint=now)
    text = refused(config, directory)
    assert "field 'input_ids': has shape [" in text
    assert "another chat template, tokenizer, data or data.max_length?" in text


def test_a_changed_loss_mask_is_found(config: Path, directory: Path):
    edit(directory, 0, "loss_mask", 0, 1)
    assert "field 'loss_mask': differs from a fresh capture at 1 places" in refused(
        config, directory
    )


def test_without_data_the_stored_tokens_are_captured_again(config: Path, directory: Path):
    report = verify_directory(directory, *load_config(config, ("data.train=[]",)), 3)
    assert report.num_recaptured == 3
    disguise(directory, layers=(2, 3))
    text = refused(config, directory, "data.train=[]", "strategy.layers=[2,3]")
    assert "values: layer 2 looks like the output of layer 1" in text


@pytest.mark.slow
def test_without_data_and_stored_tokens_it_is_said_what_is_missing(config: Path, tmp_path: Path):
    run_capture(*load_config(config, ("strategy.keep_ids=false",)))
    text = refused(config, tmp_path / "capture", "strategy.keep_ids=false", "data.train=[]")
    assert "the samples hold no input_ids" in text
    verify_directory(tmp_path / "capture", *load_config(config, ("strategy.keep_ids=false",)), 3)


def test_fewer_prompts_than_were_captured_are_said(config: Path, directory: Path):
    text = refused(config, directory, "data.limit=2", recapture=12)
    assert "the capture has a sample of prompt 11, but data.train has only 2 prompts" in text


def test_the_strategys_own_checks_see_fresh_captures(config: Path, directory: Path):
    text = refused(config, directory, "strategy.complain=true", recapture=2)
    assert text.count("tiny: complains of a fresh sample\n") == 2
    # said once, and no advice on the capture, in which nothing is wrong
    assert text.endswith("\nTry: strategy.complain=false")
    assert text.count("Try: ") == 1
    assert "specforge capture" not in text


def test_a_hopeless_capture_is_reported_in_a_few_lines(directory: Path):
    manifest = CaptureManifest.read(directory)
    for number, shard in enumerate(manifest.shards):
        rows = load_file(directory / shard.file)["loss_mask"]
        edit(directory, number, "loss_mask", slice(0, len(rows)), 3)
        edit(directory, number, "hidden", slice(0, len(rows)), float("nan"))
    with pytest.raises(CaptureError, match="perhaps more than these 20") as error:
        verify_directory(directory, None, None, 0)
    assert len(str(error.value).splitlines()) < 25
