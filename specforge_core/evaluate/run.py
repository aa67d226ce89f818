"""`specforge eval`: measure a draft on prompt sets, by lossless decoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..config import RunConfig
from ..data.chat import Encoder
from ..data.ends import end_tokens
from ..data.rows import encoder_for
from ..data.sources import (
    BadRow,
    Conversation,
    Message,
    Rows,
    Skipped,
    nothing_left,
    read_conversations,
)
from ..data.usable import check_ids
from ..devices import pick_device
from ..errors import ConfigError, DataError, PluginError, RunError
from ..files import prepare_folder, refusing, write_file
from ..progress import console
from ..strategy import Strategy
from ..target.asked import max_positions
from ..target.engine import TransformersEngine
from ..target.info import load_target_info
from ..target.tokenizer import load_tokenizer, template_options
from ..types import CaptureSpec, Draft, Proposer, TargetInfo
from .bench import Bench, EvalPrompt, open_desks
from .cached import abilities
from .decode import Limits
from .plot import plot_acceptance
from .report import EvalReport, Setup, summarize
from .sampling import ProposalError

REPORT = "eval/report.json"
PLOT = "eval/acceptance.png"


def evaluate(
    run: RunConfig, strategy: Strategy, draft: Draft, path: Path | None = None
) -> EvalReport:
    """Decode every prompt of `run.eval.prompts` with a draft, and write the report.

    Writes report.json and acceptance.png under `run.output_dir`/eval; those of an earlier
    evaluation are kept under a number, and that is said.  `path` is where the draft was read.
    It is moved to the target's device and `run.eval.dtype`, in place.  Raises
    ConfigError and DataError before the target is loaded.
    """
    info = load_target_info(run.target)
    sets = load_prompt_sets(run, strategy, load_tokenizer(run.target), info)
    make_directory(run.output_dir / Path(REPORT).parent)
    with open_target(run, strategy) as (engine, spec, limits):
        report = measure(run, strategy, draft, sets, engine, spec, limits)
    report = replace(report, draft=None if path is None else str(path))
    with refusing(RunError, "Make room there, then run the same command again"):
        keep_earlier(run.output_dir / REPORT, run.output_dir / PLOT)
        write_file(run.output_dir / REPORT, report.to_json().encode())
    plot_acceptance(report, run.output_dir / PLOT)
    return report


def keep_earlier(*paths: Path) -> None:
    """Copy files of an earlier evaluation, such as report.json, to report-1.json or the next."""
    number = 1
    while any(_numbered(path, number).exists() for path in paths):
        number += 1
    for path in paths:
        if path.exists():
            kept = _numbered(path, number)
            write_file(kept, path.read_bytes())
            console.print(f"note: {path} was there, and is {kept} now")


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def measure(
    run: RunConfig,
    strategy: Strategy,
    draft: Draft,
    sets: Mapping[str, list[EvalPrompt]],
    engine: TransformersEngine,
    spec: CaptureSpec,
    limits: Limits,
    *,
    quiet: bool = False,
) -> EvalReport:
    """Decode prompt sets with a draft, which is moved to the target's device and dtype, in place.

    `quiet` shows no progress.
    """
    options = run.eval
    desks = open_desks(
        engine.model,
        draft,
        lambda draft: ready_proposer(run, strategy, draft, engine),
        sum(map(len, sets.values())),
    )
    longest = desks[0].proposer.max_tokens
    most = min(longest, options.max_draft_tokens or longest)
    try:
        results = Bench(desks, spec, limits, most, options, quiet).run_sets(sets)
    except ProposalError as exc:
        raise PluginError(f"{strategy.package}, specforge_proposer: {exc}") from exc
    setup = Setup(
        strategy=strategy.name,
        target=run.target.path,
        temperature=options.temperature,
        dtype=str(engine.model.dtype).removeprefix("torch."),
        device=_device_name(engine.model.device),
        max_new_tokens=options.max_new_tokens,
        max_draft_tokens=most,
        at_once=len(desks),
    )
    return summarize(setup, results)


def load_prompt_sets(
    run: RunConfig, strategy: Strategy, tokenizer: PreTrainedTokenizerBase, info: TargetInfo
) -> dict[str, list[EvalPrompt]]:
    """Tokenize the prompt sets; a prompt is a conversation up to its first user turn.

    Raises ConfigError when there is none or a source is missing, DataError for a
    bad line and for a prompt that does not fit the target.
    """
    if not run.eval.prompts:
        raise ConfigError("eval.prompts names no prompt set. Try: eval.prompts.chat=FILE.jsonl")
    opened = {name: _open(name, run, strategy) for name in run.eval.prompts}
    positions = max_positions(info)
    encoder = Encoder(tokenizer, template_options(run.data), positions)
    sets = {}
    for name, sources in run.eval.prompts.items():
        skipped = Skipped(run.data.on_error)
        found = read_conversations(
            sources, run.data, opened[name], need_answer=False, skipped=skipped
        )
        sets[name] = list(islice(_tokenized(found, run, encoder, info, skipped), run.eval.limit))
        if skipped.counts:
            console.print(f"eval.prompts.{name}: {skipped}")
        if not sets[name]:
            raise nothing_left(sources, skipped.first)
    return sets


def _open(name: str, run: RunConfig, strategy: Strategy) -> Rows:
    """Return what has the rows of a prompt set's sources.  Raises ConfigError where one is gone."""
    try:
        opened = {
            source: strategy.conversations(source, run.data) for source in run.eval.prompts[name]
        }
    except DataError as exc:
        raise ConfigError(f"eval.prompts.{name}: {exc}") from exc
    return lambda source, _: opened[source]


def _tokenized(
    conversations: Iterable[Conversation],
    run: RunConfig,
    encoder: Encoder,
    info: TargetInfo,
    skipped: Skipped,
) -> Iterator[EvalPrompt]:
    for found in conversations:
        try:
            asked = first_turn(found.messages)
            ids = encoder_for(encoder, asked, found.tools, found.row).prompt(asked)
        except BadRow as exc:
            skipped.add(exc.at(found.where))
            continue
        if encoder.limit is not None and len(ids) >= encoder.limit:
            too_long = BadRow(
                f"{found.where}: a prompt of {len(ids)} tokens leaves no room for an answer in the "
                f"target's {encoder.limit} positions. Shorten or remove it, or set "
                "data.too_long=skip",
                "too long",
            )
            if run.data.too_long != "skip":  # what is asked cannot be cut
                raise too_long
            skipped.count(too_long)
            continue
        check_ids(ids, info.vocab_size, found.where)
        yield EvalPrompt(found.where, tuple(ids))


def first_turn(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the messages up to the first user turn, that one included."""
    roles = [message["role"] for message in messages]
    return messages[: roles.index("user") + 1]


@contextmanager
def open_target(
    run: RunConfig, strategy: Strategy
) -> Iterator[tuple[TransformersEngine, CaptureSpec, Limits]]:
    """Load the target in `eval.dtype`, to verify drafts with; drop it again, whatever happens."""
    own = run.eval.device
    device = pick_device(own or run.target.device, "eval.device" if own else "target.device")
    exact = run.target.model_copy(update={"dtype": run.eval.dtype})
    engine = TransformersEngine.load(exact, device)
    try:
        yield engine, *what_to_decode(run, strategy, engine)
    finally:
        engine.close()


def what_to_decode(
    run: RunConfig, strategy: Strategy, engine: TransformersEngine
) -> tuple[CaptureSpec, Limits]:
    """Return what a proposer is given, and where answers end.

    Raises a SpecForgeError where the target cannot be decoded.
    """
    abilities(engine.model)  # refuses what cannot be decoded, before anything is
    spec = strategy.adapter(run.strategy, engine.info).spec
    tokenizer = load_tokenizer(run.target)
    ends = end_tokens(engine.info, tokenizer, template_options(run.data))
    return spec, Limits(run.eval.max_new_tokens, ends)


def ready_proposer(
    run: RunConfig, strategy: Strategy, draft: Draft, engine: TransformersEngine
) -> Proposer:
    """Return a proposer whose draft is on the target's device and in its dtype, in place."""
    for module in (draft.model, draft.frozen):
        if module is not None:
            module.to(device=engine.model.device, dtype=engine.model.dtype).eval()
    return strategy.proposer(run.strategy, draft, engine.info)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def make_directory(path: Path) -> None:
    """Create the report's directory before the long part, so that it cannot fail after it."""
    with refusing(ConfigError, "Try: output_dir=DIRECTORY", path):
        prepare_folder(path)
