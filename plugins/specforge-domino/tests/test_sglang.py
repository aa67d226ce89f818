"""SGLang's own classes draft from an export what the reference loop drafts, on a CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge_core.config import TargetConfig
from specforge_core.drafts.export import write_export
from specforge_core.load import validate
from specforge_core.target.engine import TransformersEngine
from specforge_core.target.info import load_target_info
from specforge_core.testing.close import close
from specforge_core.testing.toy import save_toy_target
from specforge_core.types import CaptureSpec, Prompt, Sampling

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
HELPERS = HERE.parents[1] / "specforge-sglang" / "tests"
IDS, LAST = [int(i) for i in torch.arange(23) * 37 % 250], 101
TERMS = 2 * (6 * 32 + 64) + 6 * (32 + 20) + 64  # two layers, six steps of the GRU, the correction
OPTIONS = {"name": "domino", "layers": [1, 3], "num_layers": 2, "block_size": 6}
OPTIONS |= {"gru_hidden_dim": 20, "emb_dim": 12, "export_dtype": "float32"}
LAYOUTS = ["next_token", "same_position"]
Tensors = dict[str, Tensor]


def shift_label(config: dict[str, Any], _weights: Tensors) -> None:
    config["dflash_config"]["shift_label"] = not config["dflash_config"]["shift_label"]


def gate_order(_config: dict[str, Any], weights: Tensors) -> None:
    """Put the GRU's update gate before its reset gate."""
    reset, update, new = weights["prefix_gru.weight_hh_l0"].chunk(3)
    weights["prefix_gru.weight_hh_l0"] = torch.cat([update, reset, new])


def input_order(_config: dict[str, Any], weights: Tensors) -> None:
    """Put the GRU's state before the slot's."""
    slot, state = weights["embed_proj.0.weight"].split([32, 20], dim=1)
    weights["embed_proj.0.weight"] = torch.cat([state, slot], dim=1)


MISTAKES = (shift_label, gate_order, input_order)


@pytest.fixture(scope="module")
def python() -> str:
    """Return the interpreter of an environment with SGLang 0.5.23, made as specforge-sglang's."""
    spec = importlib.util.spec_from_file_location("sglang_conftest", HELPERS / "conftest.py")
    if spec is None or spec.loader is None or not HELPERS.exists():
        pytest.skip("specforge-sglang's tests are not beside these")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look
    spec.loader.exec_module(module)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specforge"
    found: str = module.locate("0.5.23", cache)
    return found


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetConfig:
    path = tmp_path_factory.mktemp("target") / "model"
    save_toy_target(path, tie_word_embeddings=False)
    return TargetConfig(path=str(path), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def references(target: TargetConfig, exports: Path) -> dict[str, Tensors]:
    """Export drafts, some with mistakes; return what the drafts compute here."""
    ids = torch.tensor(IDS)
    engine = TransformersEngine.load(target, torch.device("cpu"))
    (prefix,) = engine.capture(
        [Prompt(index=0, input_ids=ids, loss_mask=torch.ones_like(ids))],
        CaptureSpec(layers=(1, 3), final="none", fields={}),
    )
    engine.close()
    found, draw = {}, torch.Generator().manual_seed(3)
    info = load_target_info(target)
    for layout in LAYOUTS:
        raw = {"target": {"path": target.path}, "strategy": {**OPTIONS, "label_layout": layout}}
        run, strategy = validate(raw, layout)
        draft: Any = strategy.draft(run.strategy, info, None)
        for name, weight in draft.model.named_parameters():
            if "norm" in name:  # norms of ones would hide their order
                weight.data = 1 + 0.3 * torch.randn(weight.shape, generator=draw)
            elif "backbone" not in name:  # a correction that decides about tokens
                size = 0.5 if "embed_proj" in name else 3.0
                weight.data = size * torch.randn(weight.shape, generator=draw)
        write_export(strategy.export(run.strategy, draft, info, "sglang"), exports / layout, {})
        found[layout] = reference(draft, strategy.proposer(run.strategy, draft, info), prefix)
    for mistake in MISTAKES:
        path = shutil.copytree(exports / LAYOUTS[0], exports / mistake.__name__)
        config = json.loads((path / "config.json").read_text())
        weights = load_file(path / "model.safetensors")
        mistake(config, weights)
        (path / "config.json").write_text(json.dumps(config))
        save_file(weights, path / "model.safetensors")
    return found


def reference(draft: Any, proposer: Any, prefix: Any) -> Tensors:
    """Return the block's states, the chain, and its corrections."""
    features = torch.cat([prefix.hidden_states[i] for i in (1, 3)], dim=-1)
    states: list[Tensor] = []
    corrections: list[Tensor] = []
    model = draft.model
    model.backbone.register_forward_hook(lambda _m, _i, out: states.append(out[0]))
    model.embed_proj[2].register_forward_hook(lambda _m, _i, out: corrections.append(out))
    proposer.start(prefix)
    greedy = Sampling(temperature=0.0, generator=torch.Generator())
    tokens = proposer.propose(LAST, 99, greedy).tokens
    told = {"features": features, "states": states[0], "tokens": tokens}
    return told | {"corrections": torch.stack(corrections)}


@pytest.fixture(scope="module")
def engine(
    python: str,
    target: TargetConfig,
    references: dict[str, Tensors],
    exports: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Tensors]:
    """Return what SGLang computes from each export, all in one process."""
    assert references
    out = tmp_path_factory.mktemp("computed")
    (out / "request.json").write_text(json.dumps({"ids": IDS, "last": LAST}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, str(HERE / "sglang_forward.py"), str(HELPERS), target.path]
    command += [str(out / "request.json"), str(port), str(out)]
    command += map(str, sorted(exports.iterdir()))
    env = os.environ | {"SGLANG_USE_CPU_ENGINE": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return lambda name: load_file(out / f"{name}.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_drafts_the_same(
    engine: Callable[[str], Tensors], references: dict[str, Tensors], layout: str
) -> None:
    want, found = references[layout], engine(layout)
    assert found.keys() == want.keys()
    assert len(want["tokens"]) == 5
    assert want["corrections"].std() > 0.1
    for part, value in want.items():
        close(found[part], value, terms=TERMS, name=part)
        if value.is_floating_point():
            assert float((found[part] - value).abs().max() / value.abs().max()) < 1e-5, part


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_an_export_is_seen(
    engine: Callable[[str], Tensors],
    references: dict[str, Tensors],
    mistake: Callable[[dict[str, Any], Tensors], None],
) -> None:
    found, want = (x["corrections"] for x in (engine(mistake.__name__), references[LAYOUTS[0]]))
    assert float((found - want).abs().max()) > 1e-2
