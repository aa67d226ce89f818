"""The draft against the method written out plainly, and against Qwen3's own layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from specforge_dflash.model import DFlashModel, Frozen
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from specforge_core.testing.close import close

OPTIONS = [
    {},
    {"sliding_window": 5},
    {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    {"num_heads": 3, "num_kv_heads": 1, "head_dim": 10},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_block_equals_the_plain_form(kit: Any, options: dict[str, Any]) -> None:
    tiny = kit.tiny(scale=3.0, **options)
    batch = kit.batch()
    anchors = torch.tensor([[2, 9, 18], [0, 4, 0]])
    keep = torch.tensor([[True] * 3, [True, True, False]])
    tokens = batch["input_ids"].gather(1, anchors)
    ids = torch.full((2, 3, 4), 40)
    ids[..., 0] = tokens
    hidden = tiny.model(batch["hidden_states"], tiny.frozen.embed(ids.flatten(1)), anchors, keep)
    logits = tiny.frozen.logits(hidden).view(2, 3, 4, -1)
    weights = kit.weights64(tiny)
    for row, i in keep.nonzero().tolist():
        anchor = int(anchors[row, i])
        want = kit.logits64(weights, tiny, batch["hidden_states"][row], int(tokens[row, i]), anchor)
        close(logits[row, i], want, terms=48 + 2 * (3 * 24 + 32 + 40 + 23) + 24)


def test_a_layer_without_context_is_a_qwen3_layer(kit: Any) -> None:
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

    model = kit.tiny().model
    config = Qwen3Config(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=40,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        attn_implementation="eager",
    )
    theirs = Qwen3DecoderLayer(config, 0)
    theirs.load_state_dict(model.layers[0].state_dict())  # every name and shape agrees
    positions = torch.arange(6, 10)[None]
    x = torch.randn(1, 4, 24, generator=torch.Generator().manual_seed(0))
    want = theirs(x, position_embeddings=Qwen3RotaryEmbedding(config)(x, positions))
    anchors = torch.tensor([[6]])
    geometry = model._geometry(torch.zeros(1, 9, 48), anchors, torch.tensor([[False]]), None)
    got = model.layers[0](x, torch.zeros(1, 9, 24), geometry, None)
    close(got, want[0] if isinstance(want, tuple) else want, terms=3 * 24 + 32 + 40)


def test_a_block_sees_nothing_at_or_after_its_anchor(kit: Any) -> None:
    tiny, batch = kit.tiny(), kit.batch((19,))
    anchors, keep = torch.tensor([[4, 9]]), torch.tensor([[True, True]])
    slots = tiny.frozen.embed(torch.tensor([[3, 40, 40, 40, 5, 40, 40, 40]]))
    before = tiny.model(batch["hidden_states"], slots, anchors, keep)
    changed = batch["hidden_states"].clone()
    changed[:, 4] += 1
    after = tiny.model(changed, slots, anchors, keep)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])  # by 1e-5: much more than rounding


def test_weights_depend_on_the_seed_alone(kit: Any) -> None:
    torch.manual_seed(0)
    a = kit.tiny(seed=3).model.state_dict()
    torch.manual_seed(1)
    b, c = kit.tiny(seed=3).model.state_dict(), kit.tiny(seed=4).model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["fc.weight"], c["fc.weight"])


def test_nothing_of_the_target_is_trained_or_saved(kit: Any) -> None:
    tiny = kit.tiny()
    assert not any(p.requires_grad for p in tiny.frozen.parameters())
    assert not [n for n in tiny.model.state_dict() if "embed" in n or "head" in n]
    assert tiny.draft.shard_units == tuple(tiny.model.layers)


def test_a_tied_head_stays_one_tensor_when_cast() -> None:
    weight = torch.randn(5, 3)
    frozen = Frozen(weight, weight, 1.0, None).to(torch.bfloat16)
    assert frozen.lm_head is frozen.embed_tokens


def test_rope_tables_stay_float32_in_a_bfloat16_model(kit: Any) -> None:
    tiny = kit.tiny()
    exact = tiny.model.rotary(torch.tensor([[200]]))[0]
    tiny.model.bfloat16()
    assert torch.equal(tiny.model.rotary(torch.tensor([[200]]))[0], exact)


def test_sharded_mixed_precision_equals_a_bfloat16_model(kit: Any, tmp_path: Path) -> None:
    """FSDP casts what it is given; positions and RoPE tables must not be among it."""
    batch = kit.batch()
    anchors, keep = torch.tensor([[2, 9], [1, 4]]), torch.ones(2, 2, dtype=torch.bool)
    plain, sharded = kit.tiny(), kit.tiny()
    slots = plain.frozen.embed(torch.full((2, 8), 40))
    want = plain.model.bfloat16()(batch["hidden_states"], slots, anchors, keep)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "s")))
    try:
        mesh = init_device_mesh("cpu", (1,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for unit in sharded.draft.shard_units:
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        fully_shard(sharded.model, mesh=mesh, mp_policy=policy)
        assert isinstance(sharded.model, DFlashModel)
        got = sharded.model(batch["hidden_states"], slots, anchors, keep)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, want)
        got.float().sum().backward()
        assert sharded.model.fc.weight.grad is not None
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_layers_compile_once_for_all_of_a_type(kit: Any) -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    tiny = kit.tiny(num_layers=4, num_capture_layers=2, sliding_window=5, layer_types=types)
    batch = kit.batch()
    anchors, keep = torch.tensor([[2, 9], [1, 4]]), torch.ones(2, 2, dtype=torch.bool)
    slots = tiny.frozen.embed(torch.full((2, 8), 40))
    want = tiny.model(batch["hidden_states"], slots, anchors, keep)
    counter = CompileCounter()
    for layer in tiny.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    got = tiny.model(batch["hidden_states"], slots, anchors, keep)
    close(got, want, terms=48 + 4 * (3 * 24 + 32 + 40 + 23))
    # the first layer's input wants no gradient, so it is compiled apart
    assert counter.frame_count <= 3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("attention", ["eager", "flex"])
def test_batches_of_new_lengths_stop_compiling_soon(kit: Any, attention: str) -> None:
    tiny = kit.tiny(attention=attention)
    counter = CompileCounter()
    for layer in tiny.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    counts = []
    for length, blocks in ((30, 4), (41, 7), (170, 9), (120, 5), (99, 11), (66, 6)):
        batch = kit.batch((length,))
        anchors = torch.arange(2, 2 + blocks)[None]
        keep, ids = torch.ones_like(anchors, dtype=torch.bool), torch.full((1, blocks, 4), 40)
        with torch.no_grad():
            tiny.model(batch["hidden_states"], tiny.frozen.embed(ids.flatten(1)), anchors, keep)
        counts.append(counter.frame_count)
    assert counts[2:] == [counts[2]] * 4
    assert counts[2] <= 3
