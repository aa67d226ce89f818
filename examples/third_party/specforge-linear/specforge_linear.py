"""The smallest strategy: one linear layer from a hidden state to a drafted token.

At serving, the states up to token t - 1 are known when token t is the last one,
so state t - 1 drafts token t + 1.  H hidden size, V vocabulary, B rows of S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from specforge_core import hookimpl
from specforge_core.config import StrategyConfig
from specforge_core.types import (
    Adapter,
    Batch,
    CaptureSpec,
    Draft,
    Export,
    Field,
    Proposal,
    Proposer,
    Ratio,
    Sample,
    Sampling,
    StepContext,
    StepOutput,
    TargetCapture,
    TargetInfo,
    TrainStep,
)


class LinearConfig(StrategyConfig):
    """Options of the linear strategy."""

    layer: int = Option(-2, description="Target layer to draft from; -1 is the last.")


@dataclass(frozen=True)
class LinearAdapter:
    """Stores one layer's states."""

    spec: CaptureSpec

    def __call__(self, capture: TargetCapture) -> Sample:
        (layer,) = self.spec.layers
        return {
            "input_ids": capture.input_ids,
            "loss_mask": capture.loss_mask.to(torch.uint8),
            "hidden": capture.hidden_states[layer].bfloat16(),
        }


class Head(nn.Module):
    """A linear layer over the vocabulary."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)  # alike on every rank
        weight = torch.randn(vocab_size, hidden_size, generator=draw)
        self.weight = nn.Parameter(weight / hidden_size**0.5)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V]; the sum is a new tensor, as FSDP2 wants of an output."""
        return hidden @ self.weight.T + self.bias


def train_step(draft: Draft, batch: Batch, ctx: StepContext) -> StepOutput:
    """Cross-entropy of the token two places on, where it is supervised."""
    logits = draft.model(batch["hidden"][:, :-2]).float()  # [B, S - 2, V]
    documents = batch["document_ids"]  # a row holds several, and none predicts another's tokens
    same = documents[:, 2:] == documents[:, :-2]
    labels, mask = batch["input_ids"][:, 2:], (batch["loss_mask"][:, 2:] * same).float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    hits = (logits.argmax(-1) == labels) * mask
    starts = mask * batch["loss_mask"][:, 1:-1]  # within an answer, as a draft is served
    metrics = {
        "accuracy": Ratio(num=hits.sum(), den=mask.sum()),
        "acceptance_length": Ratio(num=((1 + hits) * starts).sum(), den=starts.sum()),
    }
    return StepOutput(loss_sum=(losses * mask).sum(), weight=mask.sum(), metrics=metrics)


class LinearProposer:
    """Drafts one token from the last verified state."""

    max_tokens = 1

    def __init__(self, model: nn.Module, layer: int) -> None:
        self.model = model
        self.layer = layer

    def start(self, prefix: TargetCapture) -> None:
        """Remember the prompt's last state."""
        self.accept(prefix)

    def accept(self, accepted: TargetCapture) -> None:
        """Remember the last verified state."""
        self.state = accepted.hidden_states[self.layer][-1]  # [H]

    @torch.no_grad()
    def propose(self, last_token: int, max_tokens: int, sampling: Sampling) -> Proposal:
        """Draft the most likely token."""
        dtype = next(self.model.parameters()).dtype
        logits: Tensor = self.model(self.state.to(dtype))
        return Proposal(tokens=logits.argmax(-1, keepdim=True), probs=None)


@hookimpl
def specforge_config() -> type[LinearConfig]:
    """Return this strategy's options."""
    return LinearConfig


@hookimpl
def specforge_adapter(config: LinearConfig, target: TargetInfo) -> Adapter:
    """Ask for one layer's output."""
    tokens = Field(shape=(None,), dtype="int64")
    mask = Field(shape=(None,), dtype="uint8")
    hidden = Field(shape=(None, target.hidden_size), dtype="bfloat16")
    fields = {"input_ids": tokens, "loss_mask": mask, "hidden": hidden}
    return LinearAdapter(CaptureSpec(layers=(config.layer % target.num_layers,), fields=fields))


@hookimpl
def specforge_draft(target: TargetInfo) -> Draft:
    """Build the layer."""
    return Draft(model=Head(target.hidden_size, target.vocab_size))


@hookimpl
def specforge_train_step() -> TrainStep:
    """Return the loss."""
    return train_step


@hookimpl
def specforge_proposer(config: LinearConfig, draft: Draft, target: TargetInfo) -> Proposer:
    """Return the drafting side."""
    return LinearProposer(draft.model, config.layer % target.num_layers)


@hookimpl
def specforge_export(config: LinearConfig, draft: Draft, format: str) -> Export | None:
    """Export as plain safetensors; no engine serves this method."""
    if format != "hf":
        return None
    weights: Mapping[str, Tensor] = draft.model.state_dict()
    config_json = {"model_type": "specforge_linear", "layer": config.layer}
    return Export(config=config_json, weights=weights)
