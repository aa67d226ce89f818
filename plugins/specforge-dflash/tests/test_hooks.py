"""The package as a run sees it, with real tiny targets of three families."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models

from specforge_core.config import TargetConfig
from specforge_core.draws import draws_of
from specforge_core.strategy import Strategy
from specforge_core.target.info import load_target_info
from specforge_core.testing.close import close
from specforge_core.types import Prompt, Sampling

VOCAB = 64
GREEDY = Sampling(temperature=0.0, generator=torch.Generator())
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
TIED = {"tie_word_embeddings": True}
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "qwen3": (
        transformers.Qwen3Config,
        transformers.Qwen3ForCausalLM,
        {"tie_word_embeddings": True},
    ),
    "gemma2": (
        transformers.Gemma2Config,
        transformers.Gemma2ForCausalLM,
        {"final_logit_softcapping": 5.0},
    ),
}


def save_target(family: str, path: Path) -> TargetConfig:
    config, model, extra = FAMILIES[family]
    torch.manual_seed(0)
    model(config(**SIZES, **extra)).save_pretrained(path)
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w0"))
    raw.add_special_tokens([AddedToken("<s>", special=True)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(path)
    return TargetConfig(path=str(path), dtype="float32", device="cpu")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_capture_train_draft_export_and_reload(kit: Any, family: str, tmp_path: Path) -> None:
    target = save_target(family, tmp_path / "target")
    info = load_target_info(target)
    strategy = Strategy.load("dflash")
    config = strategy.config().model_validate(
        {"name": "dflash", "num_layers": 2, "block_size": 4, "export_dtype": "float32"}
    )
    adapter = strategy.adapter(config, info)
    engine = strategy.target_engine(target, torch.device("cpu"))
    gen = torch.Generator().manual_seed(0)
    prompts = [
        Prompt(
            index=i,
            input_ids=torch.randint(60, (12 + i,), generator=gen),
            loss_mask=(torch.arange(12 + i) > 3).long(),
        )
        for i in range(3)
    ]
    captures = sorted(engine.capture(prompts, adapter.spec), key=lambda c: c.index)
    samples = [adapter(c) for c in captures]
    draft = strategy.draft(config, info, None)
    assert draft.model.shape.mask_token_id == 61  # the first row that is no token
    transform = strategy.transform(config, adapter.spec, 13)
    cut = [transform(s, draws_of(0, 0, i)) for i, s in enumerate(samples) if s is not None]
    batch = strategy.collate(config, adapter.spec, draft)([s for s in cut if s is not None])
    assert batch["hidden_states"].shape == (1, 12 + 13 + 13, 64)
    assert batch["document_ids"][0].bincount().tolist() == [0, 12, 13, 13]
    out = strategy.train_step(config)(draft, batch, kit.context())
    assert torch.isfinite(out.loss_sum)
    assert float(out.weight) > 0

    proposer = strategy.proposer(config, draft, info)
    proposer.start(captures[0])
    proposal = proposer.propose(5, 99, GREEDY)
    assert proposal.tokens.shape == (3,)

    made = strategy.export(config, draft, info, "hf")
    other = strategy.draft(config.model_copy(update={"seed": 5}), info, None)
    strategy.load_export(config, other, info, made)
    reread = strategy.proposer(config, other, info)
    reread.start(captures[0])
    assert torch.equal(reread.propose(5, 99, GREEDY).tokens, proposal.tokens)
    engine.close()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_embedding_and_head_are_the_targets(family: str, tmp_path: Path) -> None:
    """The scale of Gemma's embeddings and the cap of its logits included."""
    target = save_target(family, tmp_path / "target")
    info = load_target_info(target)
    strategy = Strategy.load("dflash")
    config = strategy.config().model_validate({"name": "dflash", "num_layers": 2})
    frozen: Any = strategy.draft(config, info, None).frozen
    model = transformers.AutoModelForCausalLM.from_pretrained(target.path).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        want = model(ids, output_hidden_states=True)
    close(frozen.embed(ids), want.hidden_states[0], terms=1)
    close(frozen.logits(want.hidden_states[-1]), want.logits, terms=SIZES["hidden_size"])
    tied = model.config.get_text_config().tie_word_embeddings
    assert (frozen.lm_head is frozen.embed_tokens) == bool(tied)


def test_a_named_mask_token_in_the_text_is_a_problem(kit: Any) -> None:
    from specforge_dflash import specforge_verify_capture

    strategy = Strategy.load("dflash")
    config = strategy.config().model_validate({"name": "dflash", "mask_token_id": 7})
    sample = {"input_ids": torch.tensor([1, 7])}
    check = partial(specforge_verify_capture, config=config, target=kit.target())
    problems = check(sample=sample)
    assert "contains token 7, which the draft reads as 'not drafted yet'" in str(problems[0])
    assert check(sample={"input_ids": torch.tensor([1])}) == []
