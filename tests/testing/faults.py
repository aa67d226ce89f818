"""Faults to plant in the method that `specforge new` writes; a point of the suite finds each."""

from __future__ import annotations

# fault -> (the point that has to fail, what the strategy does instead of the template's)
FAULTS = {
    "another dtype than the spec's": (
        "test_samples_match_the_spec",
        "adapter",
        """
        from specforge_example import specforge_adapter as right
        inner = right(target)
        class Wide:
            spec = inner.spec
            def __call__(self, capture):
                return inner(capture) | {"final": capture.final.float()}
        return Wide()
        """,
    ),
    "weights of the global seed": (
        "test_the_first_weights_do_not_hang_on_the_global_seed",
        "draft",
        """
        draft = right_draft(config, target)
        torch.nn.init.normal_(draft.model.blocks[0].weight)
        return draft
        """,
    ),
    "a metric of the core's": (
        "test_outputs_have_the_types_and_names_that_add_up",
        "train_step",
        "return changed(lambda out: {'metrics': {'loss': out.metrics['accuracy']}})",
    ),
    "a metric that hangs on the data": (
        "test_outputs_have_the_types_and_names_that_add_up",
        "train_step",
        """
        one = Ratio(num=torch.ones(()), den=torch.ones(()))
        return changed(lambda out: {'metrics': {str(float(out.weight)): one}})
        """,
    ),
    "a loss with an axis": (
        "test_outputs_have_the_types_and_names_that_add_up",
        "train_step",
        "return changed(lambda out: {'loss_sum': out.loss_sum[None]})",
    ),
    "a parameter that nothing uses": (
        "test_every_trained_parameter_gets_a_gradient",
        "draft",
        """
        draft = right_draft(config, target)
        draft.model.register_parameter("idle", torch.nn.Parameter(torch.ones(3)))
        return draft
        """,
    ),
    "a step that is another one in float8": (
        "test_a_step_in_float8_is_near_the_one_in_float32_or_refused",
        "train_step",
        """
        from specforge_core.float8 import in_float8
        right = ChainStep(config.draft_tokens)
        def run(draft, batch, ctx):
            out = right(draft, batch, ctx)
            twice = 1 + in_float8(draft.model)
            return dataclasses.replace(out, loss_sum=out.loss_sum * twice)
        return run
        """,
    ),
    "a mean for a sum": (
        "test_a_batch_is_the_sum_of_its_samples",
        "train_step",
        "return changed(lambda out: {'loss_sum': out.loss_sum / out.weight})",
    ),
    "documents that see each other": (
        "test_a_batch_is_the_sum_of_its_samples",
        "train_step",
        """
        def run(draft, batch, ctx):
            one = torch.ones_like(batch["document_ids"])
            return step(draft, batch | {"document_ids": one}, ctx)
        return run
        """,
    ),
    "a gradient that others change": (
        "test_a_batch_is_the_sum_of_its_samples",
        "train_step",
        """
        def run(draft, batch, ctx):
            out = step(draft, batch, ctx)
            told = out.loss_sum
            share = (told - told.detach()) / batch["document_ids"].max()
            return dataclasses.replace(out, loss_sum=told.detach() + share)
        return run
        """,
    ),
    "a short sample without a graph": (
        "test_a_batch_is_the_sum_of_its_samples",
        "train_step",
        """
        def run(draft, batch, ctx):
            out = step(draft, batch, ctx)
            long = batch["input_ids"].numel() > 3
            told = out.loss_sum if long else draft.model.blocks[0].weight.sum() * 0
            return dataclasses.replace(out, loss_sum=told)
        return run
        """,
    ),
    "a division by nothing": (
        "test_nothing_supervised_weighs_nothing",
        "train_step",
        "return changed(lambda out: {'loss_sum': out.loss_sum / out.weight * out.weight})",
    ),
    "everything supervised": (
        "test_nothing_supervised_weighs_nothing",
        "train_step",
        """
        def run(draft, batch, ctx):
            return step(draft, batch | {"loss_mask": torch.ones_like(batch["loss_mask"])}, ctx)
        return run
        """,
    ),
    "more tokens than asked": (
        "test_the_proposer_keeps_to_every_limit",
        "proposer",
        """
        class More(ChainProposer):
            def propose(self, last_token, max_tokens, sampling):
                return super().propose(last_token, 99, sampling)
        return More(draft)
        """,
    ),
    "a start that remembers": (
        "test_accepting_in_pieces_drafts_as_one_start",
        "proposer",
        """
        class Sums(ChainProposer):
            total = 0
            def accept(self, accepted):
                super().accept(accepted)
                self.state = self.total = self.state - self.total
        return Sums(draft)
        """,
    ),
    "a start that wants two tokens": (
        "test_greedy_answers_are_the_targets_own_behind_one_token_too",
        "proposer",
        """
        class Pairs(ChainProposer):
            def start(self, prefix):
                assert len(prefix.input_ids) > 1
                super().start(prefix)
        return Pairs(draft)
        """,
    ),
    "a proposer that reads the token before": (
        "test_the_proposer_gets_accepted_what_the_step_simulates",
        "proposer",
        """
        class Before(ChainProposer):
            def accept(self, accepted):
                super().accept(accepted)
                self.state = accepted.final[-2] if len(accepted.final) > 1 else self.state
        return Before(draft)
        """,
    ),
    "hits behind a miss that count": (
        "test_the_proposer_gets_accepted_what_the_step_simulates",
        "train_step",
        """
        def metrics(out):
            told = out.metrics["acceptance_length"]
            some = out.metrics["accuracy"]
            more = Ratio(num=told.den + 3 * told.den * some.num / some.den, den=told.den)
            return {"metrics": {**out.metrics, "acceptance_length": more}}
        return changed(metrics)
        """,
    ),
    "a step for float32 alone": (
        "test_a_step_in_bfloat16_is_near_the_one_in_float32",
        "train_step",
        """
        def run(draft, batch, ctx):
            out = step(draft, batch, ctx)
            wide = draft.model.blocks[0].weight.dtype == torch.float32
            return out if wide else dataclasses.replace(out, loss_sum=out.loss_sum * 1.2)
        return run
        """,
    ),
    "a draft for float32 alone": (
        "test_a_step_in_bfloat16_is_near_the_one_in_float32",
        "proposer",
        """
        class Wide(ChainProposer):
            def propose(self, last_token, max_tokens, sampling):
                wide = draft.model.blocks[0].weight.dtype == torch.float32
                return super().propose(last_token, max_tokens if wide else 0, sampling)
        return Wide(draft)
        """,
    ),
    "tokens drawn at another temperature": (
        "test_what_was_drawn_comes_with_its_distribution",
        "proposer",
        """
        class Warmer(ChainProposer):
            def propose(self, last_token, max_tokens, sampling):
                probs = super().propose(last_token, max_tokens, sampling).probs
                drawn = torch.multinomial(probs.sqrt(), 1, generator=sampling.generator)
                return Proposal(tokens=drawn[:, 0], probs=probs)
        return Warmer(draft)
        """,
    ),
    "the best token for a drawn one": (
        "test_what_was_drawn_comes_with_its_distribution",
        "proposer",
        """
        class Best(ChainProposer):
            def propose(self, last_token, max_tokens, sampling):
                probs = super().propose(last_token, max_tokens, sampling).probs
                return Proposal(tokens=probs.argmax(-1), probs=probs)
        return Best(draft)
        """,
    ),
    "probabilities that are none": (
        "test_what_was_drawn_comes_with_its_distribution",
        "proposer",
        """
        class Logits(ChainProposer):
            def propose(self, last_token, max_tokens, sampling):
                tokens = super().propose(last_token, max_tokens, sampling).tokens
                return Proposal(tokens=tokens, probs=torch.ones(len(tokens), 260))
        return Logits(draft)
        """,
    ),
    "an import that turns weights around": (
        "test_an_export_loads_as_what_was_exported",
        "import",
        """
        with torch.no_grad():
            for name, parameter in draft.model.named_parameters():
                parameter.copy_(export.weights[name].T)
        return True
        """,
    ),
    "an import that takes any shape": (
        "test_an_export_loads_as_what_was_exported",
        "import",
        "draft.model.load_state_dict(dict(export.weights), strict=False); return True",
    ),
    "state that no checkpoint holds": (
        "test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not",
        "train_step",
        """
        calls = []
        def grow(out):
            calls.append(1)
            return {"loss_sum": out.loss_sum * (1 if len(calls) < 3 else -1)}
        return changed(grow)
        """,
    ),
}
SOURCE = """
import dataclasses
import torch
from specforge_core import hookimpl
from specforge_core.types import Proposal, Ratio
from specforge_example import *
from specforge_example import ChainProposer, ChainStep
from specforge_example import specforge_draft as right_draft
step = ChainStep(3)

def changed(change):
    def run(draft, batch, ctx):
        out = step(draft, batch, ctx)
        return dataclasses.replace(out, **change(out))
    return run

@hookimpl
def specforge_{hook}({arguments}):
{body}
"""
ARGUMENTS = {
    "adapter": "target",
    "draft": "config, target",
    "train_step": "config",
    "proposer": "draft",
    "import": "draft, export",
}
