"""What is stored, which rows are labels, and how samples are put together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from specforge_eagle3.adapter import (
    Eagle3Adapter,
    Eagle3Transform,
    check_choices,
    trained_labels,
)
from specforge_eagle3.config import Eagle3Config
from transformers import AutoModelForCausalLM

from specforge_core.batches.collate import pad
from specforge_core.config import TargetConfig
from specforge_core.target.engine import TransformersEngine
from specforge_core.testing.close import close
from specforge_core.testing.toy import save_toy_target
from specforge_core.types import Prompt


@pytest.mark.parametrize(
    ("mask_on", "want"),
    [("label", [0, 0, 1, 1, 0, 0]), ("input", [0, 0, 0, 1, 1, 0]), ("feature", [0, 0, 0, 0, 1, 1])],
)
def test_which_positions_are_labels(mask_on: str, want: list[int]) -> None:
    """Tokens 3 and 4 of six are supervised; u is a label through u+1, u or u-1."""
    mask = torch.tensor([0, 0, 0, 1, 1, 0])
    assert trained_labels(mask, mask_on).int().tolist() == want


@pytest.mark.parametrize("mask_on", ["label", "input", "feature"])
def test_no_label_looks_across_a_boundary(mask_on: str) -> None:
    ones = torch.ones(5, dtype=torch.long)
    documents = torch.tensor([1, 1, 1, 2, 2])
    both = trained_labels(ones, mask_on, documents)
    parts = [trained_labels(ones[:3], mask_on), trained_labels(ones[:2], mask_on)]
    assert torch.equal(both, torch.cat(parts))
    assert not trained_labels(ones[:1], mask_on).any()
    assert trained_labels(ones[:0], mask_on).shape == (0,)


def test_a_capture_of_a_real_target(tmp_path: Path) -> None:
    """The final state is normed, and the choices are the model's own."""
    save_toy_target(tmp_path, num_hidden_layers=8)
    config = Eagle3Config(name="eagle3", draft_vocab_size=64)
    engine = TransformersEngine.load(
        TargetConfig(path=str(tmp_path), dtype="float32"), torch.device("cpu")
    )
    adapter = Eagle3Adapter.build(config, engine.info)
    assert adapter.spec.layers == (1, 3, 4)
    ids = torch.randint(256, (600,), generator=torch.Generator().manual_seed(0))  # two chunks
    mask = torch.ones_like(ids)
    short = torch.tensor([3, 4])
    prompts = [
        Prompt(index=0, input_ids=ids, loss_mask=mask),
        # no label: token 1 has no row before it
        Prompt(index=1, input_ids=short, loss_mask=torch.tensor([0, 1])),
    ]
    long, nothing = (adapter(c) for c in sorted(engine.capture(prompts, adapter.spec), key=_index))
    engine.close()
    assert nothing is None
    assert long is not None
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        output = model(ids[None], output_hidden_states=True)
    states = torch.cat([output.hidden_states[i + 1][0] for i in (1, 3, 4)], -1).bfloat16()
    # rounding to bfloat16 may go the other way
    close(long["hidden_states"], states, terms=1, factor=1)
    final = output.hidden_states[-1][0].bfloat16()
    close(long["final"], final, terms=1, factor=1)
    assert torch.equal(long["target_argmax"], output.logits[0].argmax(-1))
    # eight layers, at most 96 wide
    close(long["target_logsumexp"], output.logits[0].logsumexp(-1), terms=8 * 5 * 96)


def _index(capture: Any) -> int:
    index: int = capture.index
    return index


def test_cut_samples_without_a_label_are_dropped(kit: Any) -> None:
    from specforge_eagle3.adapter import capture_spec

    (sample,) = kit.samples((13,))
    sample["loss_mask"].zero_()
    sample["loss_mask"][8] = 1
    spec = capture_spec((1, 3, 4), 24)
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert Eagle3Transform(spec, 8, "label")(sample, generator) is None
    cut = Eagle3Transform(spec, 9, "label")(sample, generator)
    assert cut is not None
    assert torch.equal(generator.get_state(), before)  # nothing is drawn
    assert {len(v) for v in cut.values()} == {9}


@pytest.mark.parametrize("mask_on", ["label", "input", "feature"])
def test_a_batch_is_worked_out_once_on_the_cpu(kit: Any, mask_on: str) -> None:
    """Packed or padded before, it is the same; and it is what the words say of each label."""
    tiny = kit.tiny(mask_on=mask_on)
    samples = kit.samples((13, 1, 9, 3))
    batch = kit.batch(tiny, samples)
    padded = kit.batch(tiny, samples, pad)
    assert batch.keys() == padded.keys()
    for name, tensor in batch.items():
        assert torch.equal(tensor, padded[name]), name
    lengths = torch.tensor([13, 1, 9, 3])
    assert batch["document_ids"].tolist() == [
        torch.arange(1, 5).repeat_interleave(lengths).tolist()
    ]
    assert batch["bounds"].tolist() == [0, 13, 14, 23, 26]
    assert batch["longest"].shape == (13, 0)

    label = 0
    for start, sample in zip((0, 13, 14, 23), samples, strict=True):
        asked = trained_labels(sample["loss_mask"], mask_on)
        for u in range(len(asked)):
            choice = int(sample["target_argmax"][u])
            if not asked[u] or not tiny.model.t2d[choice]:
                continue
            rows = [u - 1 - i for i in range(3)]
            present = [row >= 0 for row in rows]
            assert batch["present"][label].tolist() == present
            want = [start + row if row >= 0 else 0 for row in rows]
            assert batch["students"][label].tolist() == want
            weights = [0.8**i * (row >= 0) for i, row in enumerate(rows)]
            assert batch["row_weights"][label].tolist() == pytest.approx(weights)
            assert int(batch["choices"][label]) == choice
            assert torch.equal(batch["final"][label], sample["final"][u])
            assert batch["logsumexp"][label] == sample["target_logsumexp"][u]
            label += 1
    assert label == len(batch["choices"]) > 3


def test_a_batch_without_a_label_has_empty_tensors(kit: Any) -> None:
    tiny = kit.tiny()
    (sample,) = kit.samples((5,))
    sample["loss_mask"].zero_()
    batch = kit.batch(tiny, [sample])
    assert batch["present"].shape == (0, 3)
    assert not batch["supervised"].any()


def test_choices_beyond_the_vocabulary_are_a_problem() -> None:
    assert check_choices({"target_argmax": torch.tensor([0, 28])}, 29) == []
    (problem,) = check_choices({"target_argmax": torch.tensor([0, 29])}, 29)
    assert "has values 0 to 29, allowed are 0 to 28" in str(problem)
