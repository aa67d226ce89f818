"""One draft exported and served by SGLang: what is accepted there, and how fast it answers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from specforge_core.data.ends import end_tokens
from specforge_core.drafts.load import export_checkpoint
from specforge_core.errors import SpecForgeError
from specforge_core.evaluate.run import load_prompt_sets
from specforge_core.load import load_config
from specforge_core.target.info import load_target_info
from specforge_core.target.tokenizer import load_tokenizer, template_options
from specforge_core.types import NotServed, ServedAnswer


def serve(config: str, trained: str, result: str, python: str, *overrides: str) -> None:
    """Write `result`: the acceptance by prompt set and tokens/s, or why the draft is not served.

    The prompts are those of the evaluation, greedy, all in flight at once (the engine takes 16).
    """
    path = Path(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        told = _serve(Path(config), Path(trained), path.with_suffix(""), python, overrides)
    except SpecForgeError as exc:
        told = {"not_served": str(exc)}
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _serve(
    config: Path, trained: Path, export: Path, python: str, overrides: tuple[str, ...]
) -> dict[str, Any]:
    engine = ("target.engine=sglang", f"target.options={{python: {json.dumps(python)}}}")
    run, strategy = load_config(config, (*overrides, *engine))
    export_checkpoint(trained, "sglang", export, force=True)
    info, tokenizer = load_target_info(run.target), load_tokenizer(run.target)
    sets = load_prompt_sets(run, strategy, tokenizer, info)
    ends = end_tokens(info, tokenizer, template_options(run.data))
    drafted = _drafted(trained)
    server = strategy.serve(run.target, export, drafted)
    if isinstance(server, NotServed):
        return {"not_served": server.reason}
    prompts = [prompt.input_ids for found in sets.values() for prompt in found]
    try:
        server.answer(prompts[:1], 8, ends)  # warms up
        began = time.monotonic()
        answers = server.answer(prompts, run.eval.max_new_tokens, ends)
        seconds = time.monotonic() - began
        name = server.name
    finally:
        server.close()
    lengths, left = {}, list(answers)
    for set_name, found in sets.items():
        lengths[set_name], left = _length(left[: len(found)]), left[len(found) :]
    return {
        "engine": name,
        "tokens_per_second": sum(len(answer.tokens) for answer in answers) / seconds,
        "acceptance_length": _length(answers),
        "per_set": lengths,
    }


def _drafted(trained: Path) -> int:
    """Return how many tokens the reference loop drafted."""
    out, method = trained.parent.parent, trained.name
    report = out / "eval" / f"{method}-t0" / "eval/report.json"
    if not report.exists():
        raise SpecForgeError(f"{report} is not there. Do the stage eval first")
    return int(json.loads(report.read_text(encoding="utf-8"))["max_draft_tokens"])


def _length(answers: list[ServedAnswer]) -> float | None:
    verifications = sum(answer.verifications for answer in answers)
    return sum(answer.emitted for answer in answers) / verifications if verifications else None
