"""`specforge data`: what a run would be trained on, to look at before anything costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..config import RunConfig
from ..strategy import Strategy
from ..target.info import load_target_info
from ..target.tokenizer import load_tokenizer
from ..text import counted, harmless
from ..types import Prompt
from .prompts import PromptSet, run_prompts
from .sources import told

ON, OFF = "bold green", "dim"  # what is supervised, and what is only read
MARKS = ("⟦", "⟧")  # around what is supervised, where there are no colours
PARTS = (0.0, 0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True, slots=True)
class DataReport:
    """The tokenized data of a run."""

    prompts: PromptSet
    sources: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase

    def as_json(self) -> dict[str, object]:
        """Return the numbers."""
        prompts = self.prompts
        return {
            "conversations": prompts.told.conversations,
            "sources": dict(zip(self.sources, prompts.told.sources, strict=True)),
            "held_out": prompts.told.other_side,
            "rows": len(prompts),
            "tokens": prompts.num_tokens,
            "supervised": prompts.num_supervised,
            "lengths": self._lengths(),
            "cut": prompts.told.cut,
            "skipped": prompts.skipped,
        }

    def _lengths(self) -> dict[str, int]:
        """Return the tokens of the row at each part of all, the shortest first."""
        lengths = self.prompts.lengths.sort().values.tolist()
        return {f"{part:.0%}": lengths[round(part * (len(lengths) - 1))] for part in PARTS}

    def _held_out(self) -> str:
        told = self.prompts.told
        if told.least is None:
            return str(told.other_side or "none")
        return f"none, so that training is refused; the least part with one is {told.least}"

    def __str__(self) -> str:
        prompts = self.prompts
        shortest, half, most, nearly, longest = self._lengths().values()
        share = prompts.num_supervised / prompts.num_tokens
        sources = dict(zip(self.sources, prompts.told.sources, strict=True))
        lines = [
            f"{counted(prompts.told.conversations, 'conversation')}, "
            f"{counted(len(prompts), 'row')} to train on",
            *(f"  {count:,} of {source}" for source, count in sources.items() if len(sources) > 1),
            f"held out by data.validation: {self._held_out()}",
            f"{counted(prompts.num_tokens, 'token')}, {prompts.num_supervised:,} supervised "
            f"({share:.1%})",
            f"lengths: {shortest:,} to {longest:,} tokens, half up to {half:,}, 90% up to "
            f"{most:,}, 99% up to {nearly:,}",
            f"cut to {longest:,} tokens: {counted(prompts.told.cut, 'row')}"
            if prompts.told.cut
            else "cut: none",
            f"skipped: {told(prompts.skipped) or 'none'}",
        ]
        return "\n".join(lines)

    def show(self, count: int) -> None:
        """Print the first rows, in colour where there are colours."""
        console = Console(soft_wrap=True, highlight=False)
        for row in self.rows(count, colour=console.is_terminal and not console.no_color):
            console.print()
            console.print(row)

    def rows(self, count: int, *, colour: bool) -> Iterator[Text]:
        """Yield the first rows as the target reads them, with what is supervised set off."""
        for prompt in self.prompts[:count]:
            yield self._row(prompt, colour)

    def _row(self, prompt: Prompt, colour: bool) -> Text:
        supervised = int(prompt.loss_mask.sum())
        title = f"row {prompt.index}: {len(prompt.input_ids)} tokens, {supervised} supervised\n"
        text = Text(title, style="bold" if colour else "")
        pairs = zip(prompt.loss_mask.tolist(), prompt.input_ids.tolist(), strict=True)
        for on, group in groupby(pairs, key=lambda pair: pair[0]):
            part = harmless(str(self.tokenizer.decode([token for _, token in group])))
            if colour:
                text.append(part, style=ON if on else OFF)
            else:
                text.append(part.join(MARKS) if on else part)
        return text


def report_data(run: RunConfig, strategy: Strategy) -> DataReport:
    """Read and tokenize a run's data as a training would; no weight of the target is read."""
    target = load_target_info(run.target)
    tokenizer = load_tokenizer(run.target)
    prompts = run_prompts(run, strategy, target, tokenizer).load()
    return DataReport(prompts, run.data.train, tokenizer)
