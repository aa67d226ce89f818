"""What is drafted is what was trained: same rows, same steps, same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specforge_eagle3.proposer import Eagle3Proposer
from specforge_eagle3.rows import Documents
from specforge_eagle3.vocab import target_tokens
from torch import Tensor

from specforge_core.evaluate.tree import check_tree, depths
from specforge_core.testing.close import close
from specforge_core.types import Sampling, TargetCapture

HIDDEN = 24
# four steps: fc, attention's and the MLP's products at most 96 wide, 20 keys, the head
WIDTHS = 4 * (3 * HIDDEN + 5 * 96 + 20 + HIDDEN)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm_output": True, "fc_norm": True},
    {"layer_type": "qwen3", "draft_vocab_size": "full"},
]


def capture(sample: dict[str, Tensor], start: int, end: int) -> TargetCapture:
    states = sample["hidden_states"][start:end].view(end - start, 3, HIDDEN).unbind(1)
    layers = dict(zip((1, 3, 4), states, strict=True))
    ids = sample["input_ids"][start:end]
    mask = torch.ones_like(ids)
    return TargetCapture(index=0, input_ids=ids, loss_mask=mask, hidden_states=layers)


def sampling(temperature: float = 0.0, seed: int = 0) -> Sampling:
    generator = torch.Generator().manual_seed(seed)
    return Sampling(temperature=temperature, generator=generator)


def started(
    kit: Any, end: int = 9, **options: Any
) -> tuple[Any, Eagle3Proposer, dict[str, Tensor]]:
    tiny = kit.tiny(**options)
    (sample,) = kit.samples((20,))
    proposer = Eagle3Proposer(tiny.config, tiny.model, tiny.frozen)
    proposer.start(capture(sample, 0, end))
    return tiny, proposer, sample


@pytest.mark.parametrize("options", VARIANTS)
def test_chain_logits_are_the_training_forwards(kit: Any, options: dict[str, Any]) -> None:
    """Round after round, with whatever was accepted in between."""
    steps = 4
    tiny, proposer, sample = started(kit, 5, steps=steps, **options)
    ids = sample["input_ids"].tolist()
    with torch.no_grad():
        embeddings = tiny.frozen.embed(sample["input_ids"])
        docs = Documents.of_lengths([20], "cpu")
        states = tiny.model.unroll(sample["hidden_states"], embeddings, docs, steps)
        trained = [tiny.model.lm_head(s) for s in states]
    known = 5  # tokens whose features the target has given
    for accepted in (1, 4, 2):
        logits = proposer.chain_logits(ids[known], ids[known + 1 : known + steps])
        for i in range(steps):
            close(logits[i], trained[i][known - 1], terms=WIDTHS)
        proposer.accept(capture(sample, known, known + accepted))
        known += accepted


def test_a_greedy_chain_follows_its_own_logits(kit: Any) -> None:
    tiny, proposer, sample = started(kit, draft_length=4)
    assert proposer.max_tokens == 4
    last = int(sample["input_ids"][9])
    proposal = proposer.propose(last, 9, sampling())
    assert proposal.probs is None
    assert proposal.parents is None
    drafted = proposal.tokens.tolist()
    assert len(drafted) == 4
    assert bool(tiny.model.t2d[proposal.tokens].all())
    _, again, _ = started(kit, draft_length=4)
    logits = again.chain_logits(last, drafted[:-1])
    assert target_tokens(tiny.model.d2t)[logits.argmax(-1)].tolist() == drafted
    _, short, _ = started(kit, draft_length=4)
    assert short.propose(last, 2, sampling()).tokens.tolist() == drafted[:2]


def test_a_drawn_chain_says_what_it_was_drawn_from(kit: Any) -> None:
    tiny, proposer, sample = started(kit, draft_length=3)
    last = int(sample["input_ids"][9])
    proposal = proposer.propose(last, 3, sampling(0.7))
    assert proposal.probs is not None
    assert proposal.probs.shape == (3, 29)
    assert not proposal.probs[:, ~tiny.model.t2d].any()
    _, again, _ = started(kit, draft_length=3)
    logits = again.chain_logits(last, proposal.tokens[:-1].tolist())
    want = torch.softmax(logits / 0.7, -1)
    close(proposal.probs[:, tiny.model.t2d], want, terms=WIDTHS)


def test_a_tree_holds_the_most_probable_paths(kit: Any) -> None:
    tiny, proposer, sample = started(kit, draft_length=3, tree_top_k=4, tree_tokens=9)
    last = int(sample["input_ids"][9])
    assert proposer.max_tokens == 9
    proposal = proposer.propose(last, 99, sampling())
    assert proposal.parents is not None
    check_tree(proposal)
    tokens, parents = proposal.tokens.tolist(), proposal.parents.tolist()
    assert len(tokens) == 9
    assert max(depths(parents)) == 3
    assert len(set(zip(tokens, parents, strict=True))) == 9  # siblings differ

    # every path's probability, by a chain of its own
    draft_ids = {t: i for i, t in enumerate(target_tokens(tiny.model.d2t).tolist())}

    def path_score(path: list[int]) -> float:
        _, chain, _ = started(kit, draft_length=3)
        logits = chain.chain_logits(last, path[:-1]).log_softmax(-1)
        return sum(float(row[draft_ids[t]]) for row, t in zip(logits, path, strict=True))

    def path_to(node: int) -> list[int]:
        return [] if node < 0 else [*path_to(parents[node]), tokens[node]]

    kept = {tuple(path_to(i)): path_score(path_to(i)) for i in range(9)}
    worst = min(kept.values())
    singles = [[t] for t in draft_ids]
    # beyond what rounding does to a sum of three logarithms of about 3
    better = [p for p in singles if path_score(p) > worst + 1e-5 and tuple(p) not in kept]
    # a level holds tree_top_k branches of a node, so only those beyond them may be missing
    assert len(better) == 0 or len([p for p in kept if len(p) == 1]) == 4


def test_a_tree_never_exceeds_what_it_is_asked_for(kit: Any) -> None:
    for asked in (1, 2, 5):
        _, proposer, sample = started(kit, draft_length=3, tree_top_k=3, tree_tokens=9)
        proposal = proposer.propose(int(sample["input_ids"][9]), asked, sampling(1.0))
        assert len(proposal.tokens) == asked
        assert proposal.probs is None
        check_tree(proposal)
