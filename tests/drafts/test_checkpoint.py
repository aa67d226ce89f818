from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge_core.drafts.checkpoint import CHECKSUMS, STATE, checkpoints, find, read_state
from specforge_core.drafts.load import restore
from specforge_core.drafts.verify import verify_draft
from specforge_core.errors import CheckpointError
from specforge_core.testing.runs import load, losses
from specforge_core.testing.toy import save_toy_target
from specforge_core.train.run import train

from ..runs import linear_run

pytest.importorskip("specforge_linear", reason="the linear example is not installed")


FOUND = r"state\.json is damaged: its checksum is"


@pytest.fixture
def config(tmp_path: Path, toy_target: Path) -> Path:
    return linear_run(tmp_path, toy_target)


@pytest.mark.slow
def test_a_run_of_0_1_goes_on_as_it_would_have(config: Path, tmp_path: Path) -> None:
    train(*load(config))
    whole = losses(tmp_path / "run")
    last = find(tmp_path / "run")
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    path = find(tmp_path / "run") / STATE
    path.with_name(CHECKSUMS).unlink()
    state = json.loads(path.read_text())
    assert state["step"] == 3
    for name in ("total_steps", "machine"):
        del state[name]
    # 12 samples in all, of which each of two ranks took 6
    position = state.pop("position")
    state |= {"positions": [position // 2, position // 2 + 1], "world_size": 2, "generators": []}
    path.write_text(json.dumps(state))
    found = read_state(path.parent)
    assert (found.position, found.total_steps) == (position, 6)
    train(*load(config))
    assert losses(tmp_path / "run") == whole


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"step": 1, "odd": 2}'])
def test_a_damaged_state_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / STATE).write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json is damaged: .*Restore it"):
        read_state(tmp_path)


def test_what_is_no_run_is_an_error(tmp_path: Path) -> None:
    assert checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match=r"holds no complete checkpoint\. Try: specforge"):
        find(tmp_path)
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has no state\.json"):
        read_state(tmp_path)


def test_only_whole_checkpoints_named_by_their_step_are_found(tmp_path: Path) -> None:
    names = ["step-00000009", "step-00000010", "step-100000000", "step-00000011"]
    odd = ["step-00000012.bak", "step-12", "step-٠٠٠٠٠٠٩٩", "step--0000001", ".step-00000099.tmp"]
    for name in (*names, *odd):
        path = tmp_path / "checkpoints" / name
        path.mkdir(parents=True)
        (path / STATE).touch()
    (tmp_path / "checkpoints/step-00000011" / STATE).unlink()
    (tmp_path / "checkpoints/step-00000098").touch()
    found = [path.name for path in checkpoints(tmp_path)]
    assert found == ["step-00000009", "step-00000010", "step-100000000"]
    assert find(tmp_path).name == "step-100000000"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The newest checkpoint of a run of three steps."""
    path = tmp_path_factory.mktemp("trained")
    save_toy_target(path / "target")
    train(*load(linear_run(path, path / "target"), "train.max_steps=3"))
    return find(path / "run")


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the run of `trained`, beside its config."""
    shutil.copytree(trained.parents[2], tmp_path / "copy")
    config = tmp_path / "copy" / "run.yaml"
    raw = yaml.safe_load(config.read_text()) | {"output_dir": str(tmp_path / "copy/run")}
    config.write_text(yaml.safe_dump(raw))
    return config


def newest(config: Path) -> Path:
    return find(config.parent / "run")


def unchecked(config: Path) -> Path:
    """Return the newest checkpoint, as of a version that wrote no checksums."""
    (newest(config) / CHECKSUMS).unlink()
    return newest(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step: Input should be greater than or equal to 0, got -1"),
        ({"step": None}, "step: Input should be a valid integer, got None"),
        ({"step": 3.5}, "step: Input should be a valid integer, got 3.5"),
        ({"step": "3"}, "step: Input should be a valid integer, got '3'"),
        ({"step": True}, "step: Input should be a valid integer, got True"),
        ({"step": [3]}, "step: Input should be a valid integer"),
        ({"step": 2}, "it is of step 2"),
        ({"total_steps": 0}, "total_steps: Input should be greater than or equal to 1"),
        ({"num_tokens": -5}, "num_tokens: Input should be greater than or equal to 0"),
        ({"position": -5}, "position: Input should be greater than or equal to 0"),
        ({"position": 10**30}, "position: Input should be"),
        ({"position": 2**63}, "position: Input should be less than or equal to"),
        ({"seconds": None}, "seconds: Input should be a valid number"),
        ({"seconds": -1.0}, "seconds: Input should be greater than or equal to 0"),
        ({"seconds": float("nan")}, "is damaged"),
        ({"strategy": 3}, "strategy: Input should be a valid string"),
        ({"config": None}, "config: Input should be an object"),
        ({"config": []}, "config: Input should be an object"),
        ({"config": {}}, "config: has no section target"),
        ({"identity": {}}, "identity.strategy: Field required"),
        ({"surprise": 1}, "surprise is unknown"),
        ({"positions": [], "world_size": 1}, "positions: List should have at least 1 item"),
        ({"positions": [-5], "world_size": 1}, "positions.0: Input should be greater than"),
        ({"positions": [1], "world_size": 0}, "world_size: Input should be greater than"),
        ({"positions": [1], "world_size": 3}, "it has 1 positions of 3 ranks"),
        ({"positions": None, "world_size": 1}, "positions: Input should be a valid list"),
        ({"positions": [0.5], "world_size": 1}, "positions.0: Input should be a valid integer"),
    ],
)
def test_a_state_that_no_run_wrote_is_refused_by_its_field(
    copy: Path, change: dict[str, object], message: str
) -> None:
    path = unchecked(copy) / STATE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for use in (lambda: train(*load(copy)), lambda: restore(*load(copy), path.parent)):
        with pytest.raises(CheckpointError, match=r"state\.json is damaged: ") as found:
            use()
        assert message in str(found.value)
        assert len(str(found.value)) < 600


@pytest.mark.parametrize(
    "change",
    [
        *({"position": 3}, {"position": 10**14}, {"num_tokens": 10**15}, {"seconds": 1e14}),
        *({"logged": 99}, {"window": {"loss": [1.0, -1.0]}}, {"total_steps": 1}),
        *({"machine": {}}, {"versions": {}}, {"first_window": None, "length": 7}),
        *({"stepp": 3}, {"step": None}),  # its checksum tells before its parser does
    ],
)
def test_a_state_whose_numbers_were_changed_is_found(copy: Path, change: dict[str, object]) -> None:
    """Any of these values is one that another run may have: only its checksum tells."""
    path = newest(copy) / STATE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for use in (
        lambda: train(*load(copy, "train.max_steps=4")),
        lambda: restore(*load(copy), path.parent),
        lambda: verify_draft(copy.parent / "run"),
    ):
        with pytest.raises(CheckpointError, match=f"{FOUND}.*no earlier .* Try: output_dir=ANOTH"):
            use()
    earlier = shutil.copytree(path.parent, path.parents[1] / "step-00000002")
    advice = f"or use {earlier}. To train on from there: rm -r {path.parent}$"
    with pytest.raises(CheckpointError, match=f"{FOUND}.* {advice}"):
        train(*load(copy))


@pytest.mark.parametrize("generators", [[], [[1, 2, 3]], 5, None])
def test_generators_of_0_1_are_not_read(trained: Path, tmp_path: Path, generators: object) -> None:
    """What is random is drawn by seed and sample."""
    state = json.loads((trained / STATE).read_text())
    position = state.pop("position")
    old = {"positions": [position], "world_size": 1, "generators": generators}
    (tmp_path / STATE).write_text(json.dumps(state | old))
    assert read_state(tmp_path).position == position


@pytest.mark.parametrize("section", ["train", "strategy", "target", "data"])
def test_a_stored_config_without_a_section_is_refused(copy: Path, section: str) -> None:
    path = unchecked(copy) / STATE
    state = json.loads(path.read_text())
    del state["config"][section]
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=f"damaged: config: has no section {section}"):
        train(*load(copy))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "\xff", "nul\0"])
def test_a_state_that_no_parser_likes_is_refused(copy: Path, text: str) -> None:
    (unchecked(copy) / STATE).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        train(*load(copy))


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    """Change the tensors and the metadata of a checkpoint's one file, as if it had no checksums."""
    (path / CHECKSUMS).unlink()
    (file,) = path.glob("*.safetensors")
    with safe_open(str(file), framework="pt") as opened:
        metadata = dict(opened.metadata())
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def layout(metadata: dict[str, str], value: object) -> None:
    found = json.loads(metadata["DCP_SHARDING_INFO"])
    metadata["DCP_SHARDING_INFO"] = json.dumps(found | {"model.weight": value})


Change = Callable[[dict[str, Tensor], dict[str, str]], object]
CHANGES: list[tuple[Change, str]] = [
    (lambda t, m: t["model.weight"].view(-1)[7:8].fill_(math.nan), r"'model\.weight' of .* finite"),
    (lambda t, m: t["model.bias"][:1].fill_(-math.inf), r"'model\.bias' of .* not finite"),
    (lambda t, m: t.update({"model.bias": t["model.bias"].to(torch.int8)}), "has dtype I8 in it"),
    (lambda t, m: t.update({"model.bias": t["model.bias"].half()}), "has dtype F16 in it, and flo"),
    (lambda t, m: t.update({"model.bias": t["model.bias"].double()}), "has dtype F64 in it"),
    (lambda t, m: t.update({"model.more": torch.ones(1)}), r"model\.more is in it, and not in"),
    (lambda t, m: t.pop("model.bias"), r"model\.bias is not in it"),
    (lambda t, m: t.update({"model.bias": t["model.bias"][1:].clone()}), r"has shape \[259\]"),
    (lambda t, m: layout(m, None), "is damaged"),
    (lambda t, m: layout(m, {"saved_offsets": ["0", "0"]}), "is damaged"),
    (lambda t, m: layout(m, {"saved_offsets": [-9, 0]}), r"has shape \[251, 32\] in it"),
    (lambda t, m: m.update(DCP_SHARDING_INFO="[]"), "is damaged"),
    (lambda t, m: m.update(DCP_SHARDING_INFO="[" * 100_000), "is damaged"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[m for _, m in CHANGES])
def test_tensors_that_no_run_wrote_are_refused_by_name(
    copy: Path, change: Change, message: str
) -> None:
    path = newest(copy)
    rewrite(path, change)  # type: ignore[arg-type]
    for use in (
        lambda: train(*load(copy)),
        lambda: restore(*load(copy), path),
        lambda: train(*load(copy, f"train.init_from={path}", f"output_dir={copy.parent}/new")),
    ):
        with pytest.raises(CheckpointError, match=message):
            use()


@pytest.mark.parametrize("damage", ["empty", "cut", "pipe", "header", "gone"])
def test_files_without_checksums_are_seen_to_be_tensors(copy: Path, damage: str) -> None:
    path = newest(copy)
    (path / CHECKSUMS).unlink()
    assert "no checksums are with" in str(verify_draft(path))
    (file,) = path.glob("*.safetensors")
    data = file.read_bytes()
    file.unlink()
    if damage == "pipe":
        os.mkfifo(file)
    elif damage != "gone":
        file.write_bytes({"empty": b"", "cut": data[:-9], "header": b"\xff" + data[1:]}[damage])
    message = "has no file of tensors" if damage == "gone" else r"safetensors is damaged: "
    with pytest.raises(CheckpointError, match=message):
        verify_draft(path)


def test_an_optimizer_that_is_not_finite_is_refused_where_it_is_needed(copy: Path) -> None:
    rewrite(newest(copy), lambda t, m: t["optim0.state.bias.exp_avg"].fill_(math.nan))
    restore(*load(copy), newest(copy))
    with pytest.raises(CheckpointError, match=r"'optim0\.state\.bias\.exp_avg' of .* not finite"):
        train(*load(copy, "train.max_steps=4"))


def test_what_killed_runs_left_is_removed_at_the_next_start(copy: Path, capfd) -> None:
    folder = newest(copy).parent
    left = [folder / name for name in ("step-00000009", ".step-00000008.tmp")]
    kept = [folder / name for name in ("step-00000002.bak", "notes", "step-7")]
    for path in (*left, *kept):
        path.mkdir()
        (path / "shard.safetensors").touch()
    (kept[0] / STATE).touch()
    train(*load(copy, "train.max_steps=3"))
    assert "9 has no state.json: no checkpoint" in " ".join(capfd.readouterr().err.split())
    assert [path for path in (*left, *kept) if (path / "shard.safetensors").exists()] == kept
