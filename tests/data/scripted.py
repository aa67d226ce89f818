"""A target that writes what a script says, and what is trained on afterwards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specforge_core.capture.job import Job
from specforge_core.config import RunConfig
from specforge_core.data.regenerate import RegenerateReport, regenerate
from specforge_core.load import validate
from specforge_core.strategy import Strategy
from specforge_core.testing.toy import save_toy_target, toy_tokenizer
from specforge_core.types import Prompt

from .templates import Style

ENGINE = """
    import json
    from pathlib import Path
    from specforge_core.hookspecs import hookimpl
    from specforge_core.target.info import load_target_info
    from specforge_core.types import Generated

    class Scripted:
        "Writes what target.options.script says, turn by turn."

        def __init__(self, target):
            self.info = load_target_info(target)
            self.script = json.loads(Path(target.options["script"]).read_text())
            self.asked = Path(target.options["script"]).with_suffix(".asked")

        def supports(self, spec):
            return False

        def capture(self, prompts, spec):
            raise NotImplementedError

        def generate(self, prompts, options):
            for prompt in prompts:
                answer = self.script[str(prompt.index)].pop(0)
                with self.asked.open("a") as file:
                    print(json.dumps([prompt.input_ids.tolist(), answer["tokens"]]), file=file)
                tokens = tuple(answer["tokens"])
                yield Generated(index=prompt.index, **{**answer, "tokens": tokens})

        def close(self):
            pass

    @hookimpl
    def specforge_target_engine(target):
        return Scripted(target) if target.engine == "scripted" else None
"""
THOUGHT, SAID = "think of  the answer", "say the answer,\n\nthen  more"
QUESTIONS = (("first",), ("the answer", "and the next?", "the last\n"))


def save(style: Style, path: Path) -> Any:
    tokenizer = style.tokenizer()
    ends = [tokenizer.convert_tokens_to_ids(end) for end in (style.end, style.call_end) if end]
    save_toy_target(
        path,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        eos_token_id=[tokenizer.eos_token_id, *ends],
        pad_token_id=tokenizer.eos_token_id,
    )
    tokenizer.save_pretrained(path)
    (path / "chat_template.jinja").write_text(style.template)
    return tokenizer


def write_out(tokenizer: Any, text: str, *, spelled: bool) -> list[int]:
    """Return a text's tokens: those of the tokenizer, or one for each letter of it."""
    special = "|".join(map(re.escape, tokenizer.all_special_tokens))
    pieces = re.split(f"({special})", text) if special else [text]
    letters = [
        piece if not spelled or piece in tokenizer.all_special_tokens else list(piece)
        for piece in pieces
    ]
    flat = [part for piece in letters for part in ([piece] if isinstance(piece, str) else piece)]
    parts = flat if spelled else [text]
    return [i for part in parts for i in tokenizer(part, add_special_tokens=False)["input_ids"]]


def run_of(target: Path, folder: Path, style: Style, **data: Any) -> RunConfig:
    script = {"script": str(folder / "script.json")}
    raw = {
        "target": {
            "path": str(target),
            "engine": "scripted",
            "device": "cpu",
            "dtype": "float32",
            "options": script,
        },
        "strategy": {"name": "linear"},
        "data": {
            "train": [str(folder / "answers.jsonl")],
            "chat_template_kwargs": style.kwargs,
            **data,
        },
        "regenerate": {"prompts": [str(folder / "p.jsonl")], "keep_unfinished": True},
    }
    return validate(raw, "the test")[0]


def answer(run: RunConfig, folder: Path, script: dict[str, Any], *chats: Any) -> RegenerateReport:
    (folder / "script.json").write_text(json.dumps(script))
    rows = [
        {"id": str(i), "messages": [{"role": "user", "content": question} for question in chat]}
        for i, chat in enumerate(chats)
    ]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return regenerate(run, Strategy.load("linear"), folder / "answers.jsonl")


def trained(run: RunConfig) -> list[Prompt]:
    """Return what training reads, through transformers' engine."""
    target = run.target.model_copy(update={"engine": "transformers", "options": {}})
    return list(
        Job.open(run.model_copy(update={"target": target}), Strategy.load("linear")).prompts()
    )


def supervised(prompts: list[Prompt]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield every run of supervised tokens behind what stands before it."""
    for prompt in prompts:
        ids, mask = prompt.input_ids.tolist(), [*prompt.loss_mask.tolist(), 0]
        for start in (i for i, on in enumerate(mask) if on and not mask[i - 1]):
            stop = mask.index(0, start)
            yield ids[:start], ids[start:stop]


def asked(folder: Path) -> list[tuple[list[int], list[int]]]:
    lines = (folder / "script.asked").read_text().splitlines()
    return [(read, written) for read, written in map(json.loads, lines)]


def toy_answers(tmp_path: Path, **data: Any) -> RunConfig:
    """Answer one prompt of the toy target; return the run that trains on it."""
    style = Style(str(toy_tokenizer().chat_template), "{said}", "<|im_end|>")
    save_toy_target(tmp_path / "target")
    tokens = write_out(toy_tokenizer(), "yes<|im_end|>", spelled=False)
    run = run_of(tmp_path / "target", tmp_path, style, **data)
    answer(run, tmp_path, {"0": [{"tokens": tokens, "finished": True}]}, ("Hi",))
    return run
