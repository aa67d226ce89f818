"""The draft against the method written out plainly, and against Qwen3's own layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import specforge_dflash
import torch
import torch.distributed as dist
from specforge_dflash.model import DFlashModel, Frozen
from torch import Tensor
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


def test_first_logits_spread_by_one_whatever_the_length_of_the_heads_rows(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = torch.zeros(41, 24)
    head = torch.randn(41, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    for rows in (7, 41, 100):  # that are looked at together: 41 is no multiple of the first
        monkeypatch.setattr(specforge_dflash, "ROWS", rows)
        draft = specforge_dflash.build_draft(
            kit.config(), kit.target(), embed, head, mask_token_id=40
        )
        want = 1 / head.float().norm(dim=1).mean()
        assert torch.equal(draft.model.norm.weight, want.expand(24))


@pytest.mark.parametrize("options", OPTIONS)
def test_every_block_equals_the_plain_form(kit: Any, options: dict[str, Any]) -> None:
    tiny = kit.tiny(scale=3.0, **options)
    first, second = kit.samples()
    own = [(first, 2), (first, 9), (first, 18), (second, 0), (second, 4)]  # documents, anchors
    ids = torch.full((1, 5, 4), 40)
    ids[0, :, 0] = torch.tensor([int(sample["input_ids"][a]) for sample, a in own])
    hidden = tiny.model(
        torch.cat([first["hidden_states"], second["hidden_states"]])[None],
        tiny.frozen.embed(ids.flatten(1)),
        torch.tensor([[2, 9, 18, 19, 23]]),
        torch.tensor([[0, 0, 0, 19, 19]]),
        torch.cat([torch.arange(19), torch.arange(11)])[None],
    )
    logits = tiny.frozen.logits(hidden).view(5, 4, -1)
    weights = kit.weights64(tiny)
    for i, (sample, anchor) in enumerate(own):
        token = int(sample["input_ids"][anchor])
        want = kit.logits64(weights, tiny, sample["hidden_states"], token, anchor)
        close(logits[i], want, terms=48 + 2 * (3 * 24 + 32 + 40 + 23) + 24)


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
    positions = torch.arange(4)[None]
    x = torch.randn(1, 4, 24, generator=torch.Generator().manual_seed(0))
    want = theirs(x, position_embeddings=Qwen3RotaryEmbedding(config)(x, positions))
    # the block of a document that starts with it, with another document's tokens before
    six = torch.tensor([[6]])
    geometry = model._geometry(six, six, torch.arange(9)[None], None)
    got = model.layers[0](x, torch.full((1, 9, 24), 1e3), geometry, None)
    close(got, want[0] if isinstance(want, tuple) else want, terms=3 * 24 + 32 + 40)


def test_a_block_sees_nothing_at_or_after_its_anchor(kit: Any) -> None:
    tiny, (sample,) = kit.tiny(), kit.samples((19,))
    where = torch.tensor([[4, 9]]), torch.tensor([[0, 0]]), torch.arange(19)[None]
    slots = tiny.frozen.embed(torch.tensor([[3, 40, 40, 40, 5, 40, 40, 40]]))
    states = sample["hidden_states"][None]
    before = tiny.model(states, slots, *where)
    changed = states.clone()
    changed[:, 4] += 1
    after = tiny.model(changed, slots, *where)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])  # by 1e-5: much more than rounding


def two_rows(kit: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """States of a batch of two rows, and where two blocks of each are."""
    batch = kit.batch(kit.config(batches="padded"), kit.samples())
    anchors = torch.tensor([[2, 9], [1, 4]])
    return batch["hidden_states"], (anchors, torch.zeros_like(anchors), batch["position_ids"])


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
    assert tiny.draft.shard == tuple(tiny.model.layers)


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
    states, where = two_rows(kit)
    plain, sharded = kit.tiny(), kit.tiny()
    slots = plain.frozen.embed(torch.full((2, 8), 40))
    want = plain.model.bfloat16()(states, slots, *where)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "s")))
    try:
        mesh = init_device_mesh("cpu", (1,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for unit in sharded.draft.shard:
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        fully_shard(sharded.model, mesh=mesh, mp_policy=policy)
        assert isinstance(sharded.model, DFlashModel)
        got = sharded.model(states, slots, *where)
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
    states, where = two_rows(kit)
    slots = tiny.frozen.embed(torch.full((2, 8), 40))
    want = tiny.model(states, slots, *where)
    counter = CompileCounter()
    for layer in tiny.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    got = tiny.model(states, slots, *where)
    close(got, want, terms=48 + 4 * (3 * 24 + 32 + 40 + 23))
    # the first layer's input wants no gradient, so it is compiled apart
    assert counter.frame_count <= 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("attention", "most"), [("eager", 3), ("flex", 2)])
def test_batches_of_new_lengths_stop_compiling_soon(kit: Any, attention: str, most: int) -> None:
    """Each of two documents; flex attention's tiles are more than one in every batch."""
    tiny = kit.tiny(attention=attention)
    counter = CompileCounter()
    for layer in tiny.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    counts = []
    for length, blocks in ((90, 34), (141, 37), (170, 49), (120, 35), (99, 41), (166, 36)):
        (sample,) = kit.samples((length,))
        half = length // 2
        anchors = torch.arange(half - blocks // 2, half - blocks // 2 + blocks)[None]
        positions = torch.cat([torch.arange(half), torch.arange(length - half)])[None]
        slots = tiny.frozen.embed(torch.full((1, blocks * 4), 40))
        with torch.no_grad():
            tiny.model(
                sample["hidden_states"][None], slots, anchors, (anchors >= half) * half, positions
            )
        counts.append(counter.frame_count)
    assert counts[2:] == [counts[2]] * 4
    assert counts[2] <= most
