"""What a target generated is what is trained on, whatever its template does to it afterwards."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specforge_core.batches.loader import Batches
from specforge_core.capture.job import Job
from specforge_core.config import DataConfig, RunConfig
from specforge_core.data.harmony import as_message
from specforge_core.data.regenerate import RegenerateReport, regenerate
from specforge_core.errors import DataError
from specforge_core.load import validate
from specforge_core.strategy import Strategy
from specforge_core.testing.plugin import FakeSite
from specforge_core.testing.runs import losses
from specforge_core.testing.toy import save_toy_target, toy_tokenizer
from specforge_core.train.run import train
from specforge_core.types import Prompt

from .templates import STYLES, Style

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
                yield Generated(index=prompt.index, **answer)

        def close(self):
            pass

    @hookimpl
    def specforge_target_engine(target):
        return Scripted(target) if target.engine == "scripted" else None
"""
THOUGHT, SAID = "think of  the answer", "say the answer,\n\nthen  more"
QUESTIONS = (("first",), ("the answer", "and the next?", "the last\n"))


@pytest.fixture
def scripted(fake_site: FakeSite) -> None:
    group = {"specforge.plugins": {"scripted": "scripted_engine"}}
    fake_site.dist("scripted-engine", "0.1.0", group, module="scripted_engine", source=ENGINE)


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


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(
    ("name", "spelled"),
    # tokens that the tokenizer would not write show whatever is tokenized again
    [*((name, True) for name in STYLES), ("chatml", False), ("harmony", False), ("glm4", False)],
)
def test_the_trained_tokens_are_the_generated_ones(
    tmp_path: Path, name: str, spelled: bool
) -> None:
    style = STYLES[name]
    tokenizer = save(style, tmp_path / "target")
    text = style.writes.format(thought=THOUGHT, said=SAID)
    whole = write_out(tokenizer, text + style.end, spelled=spelled)
    cut = write_out(tokenizer, text, spelled=spelled)[:-2]
    script = {
        str(i): [
            {"tokens": whole, "finished": True}
            if (i, turn) != (1, 2)
            else {"tokens": cut, "finished": False}
            for turn in range(len(chat))
        ]
        for i, chat in enumerate(QUESTIONS)
    }
    run = run_of(tmp_path / "target", tmp_path, style)
    assert answer(run, tmp_path, script, *QUESTIONS).num_written == 2

    found = list(supervised(trained(run)))

    expected = asked(tmp_path)
    assert len(expected) == 4
    assert sorted(found) == sorted(expected)
    assert sorted(written for _, written in found) == sorted([cut, whole, whole, whole])
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    by_id = {row["id"]: row for row in map(json.loads, lines)}
    assert by_id["0"]["finish_reason"] == ["stop"]
    assert by_id["1"]["finish_reason"] == ["stop", "stop", "length"]
    said = [m["content"] for m in by_id["1"]["messages"] if m["role"] == "assistant"]
    assert all(SAID.strip() in text for text in said[:2])


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("name", ["qwen3 thinking", "r1", "harmony", "glm45"])
def test_training_reads_what_the_target_wrote(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the prompts to the batches of a training, whose draft sees no other token."""
    style = STYLES[name]
    tokenizer = save(style, tmp_path / "target")
    text = style.writes.format(thought=THOUGHT, said=SAID)
    written = [{"tokens": write_out(tokenizer, text + style.end, spelled=True), "finished": True}]
    run = run_of(tmp_path / "target", tmp_path, style)
    script = {str(i): written * len(chat) for i, chat in enumerate(QUESTIONS)}
    answer(run, tmp_path, script, *QUESTIONS)
    seen: list[Prompt] = []
    micro_batches = Batches.micro_batches

    def watched(self: Batches, source: Any, position: int) -> Iterator[Any]:
        for micro in micro_batches(self, source, position):
            if micro.num_samples:
                ids, mask = micro.batch["input_ids"][0], micro.batch["loss_mask"][0]
                seen.append(Prompt(index=len(seen), input_ids=ids, loss_mask=mask))
            yield micro

    monkeypatch.setattr(Batches, "micro_batches", watched)
    raw = run.model_dump()
    raw["target"] |= {"engine": "transformers", "options": {}}
    raw |= {"output_dir": str(tmp_path / "run")}
    raw["train"] |= {
        "batch_size": 1,
        "epochs": 1,
        "log_every": 1,
        "device": "cpu",
        "compute_dtype": "float32",
    }
    train(*validate(raw, "the test"))
    epoch = seen[: len(trained(run))]
    assert len(losses(tmp_path / "run")) == len(epoch) > 1
    assert sorted(supervised(epoch)) == sorted(asked(tmp_path))


TOOLS = """{%- if tools -%}{{ '<|im_start|>tools\n' + tools|tojson + '<|im_end|>\n' }}{%- endif -%}
{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content }}
{%- for call in m.tool_calls or [] -%}
{{ '<call>' + call.function.name + call.function.arguments|tojson + '</call>' }}
{%- endfor -%}{{ '<|im_end|>\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""


@pytest.mark.usefixtures("scripted")
def test_with_tools_the_answer_behind_the_last_result_is_written(tmp_path: Path) -> None:
    """Earlier calls stand as they are: the results that follow are theirs."""
    style = Style(TOOLS, "{said}", "<|im_end|>", ("<|im_start|>",))
    tokenizer = save(style, tmp_path / "target")
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    user = {"role": "user", "content": "Look!"}
    called = [user, {"role": "assistant", "content": "", "tool_calls": [call]}]
    called += [{"role": "tool", "content": "a cat"}]
    rows = [
        {"id": "asks", "messages": [user, {"role": "assistant", "content": "ANOTHER"}]},
        {"id": "reads", "messages": [*called, {"role": "assistant", "content": "ANOTHER"}]},
    ]
    run = run_of(tmp_path / "target", tmp_path, style)
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({**row, "tools": [tool]}) + "\n" for row in rows)
    )
    texts = ['<call>look{"at": "it"}</call>', "It is a cat."]
    script = {
        str(i): [{"tokens": write_out(tokenizer, f"{t}<|im_end|>", spelled=True), "finished": True}]
        for i, t in enumerate(texts)
    }
    (tmp_path / "script.json").write_text(json.dumps(script))
    report = regenerate(run, Strategy.load("linear"), tmp_path / "answers.jsonl")
    assert (report.num_prompts, report.num_written) == (2, 2)

    expected = asked(tmp_path)
    for read, _ in expected:
        assert "<|im_start|>tools\n[{" in tokenizer.decode(read)
    assert "a cat<|im_end|>\n<|im_start|>assistant\n" in max(
        (tokenizer.decode(read) for read, _ in expected), key=len
    )
    assert sorted(supervised(trained(run))) == sorted(expected)
    # and as text: calls that were only read are not trained on
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert "ANOTHER" not in str(lines)
    plain = [{k: v for k, v in line.items() if k != "token_rows"} for line in lines]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    said = [tokenizer.decode(written) for _, written in supervised(trained(run))]
    assert sorted(said) == sorted(f"{text}<|im_end|>" for text in texts)


LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style.calls])
def test_calls_and_answers_behind_results_are_the_generated_tokens(
    tmp_path: Path, name: str
) -> None:
    """In every template that has tools, with thoughts and without."""
    style = STYLES[name]
    assert style.calls is not None
    tokenizer = save(style, tmp_path / "target")
    user = {"role": "user", "content": "the question"}
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    rows = [
        {"id": "asks", "messages": [user]},
        {"id": "reads", "messages": [user, called, {"role": "tool", "content": "THE RESULT"}]},
    ]
    run = run_of(tmp_path / "target", tmp_path, style)
    asking = "".join(json.dumps({**row, "tools": [LOOK]}) + "\n" for row in rows)
    (tmp_path / "p.jsonl").write_text(asking)
    calls = style.calls.format(thought=THOUGHT, arguments='{"at": "it"}')
    texts = [
        calls + (style.call_end or style.end),
        style.writes.format(thought=THOUGHT, said=SAID) + style.end,
    ]
    script = {
        str(i): [{"tokens": write_out(tokenizer, text, spelled=True), "finished": True}]
        for i, text in enumerate(texts)
    }
    (tmp_path / "script.json").write_text(json.dumps(script))
    report = regenerate(run, Strategy.load("linear"), tmp_path / "answers.jsonl")
    assert report.num_written == 2

    expected = asked(tmp_path)
    assert sorted(supervised(trained(run))) == sorted(expected)
    assert {tokenizer.decode(written) for _, written in expected} == set(texts)
    (asks,), (reads,) = (
        [tokenizer.decode(read) for read, written in expected if tokenizer.decode(written) == text]
        for text in texts
    )
    assert all('"name": "look"' in prompt for prompt in (asks, reads))
    assert "THE RESULT" in reads
    assert "THE RESULT" not in asks
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    kept = {row["id"]: row for row in map(json.loads, lines)}
    last = kept["asks"]["messages"][-1]
    assert "look" in (last["content"] or last["tool_calls"][0]["function"]["name"])


def toy_answers(tmp_path: Path, **data: Any) -> RunConfig:
    """Answer one prompt of the toy target; return the run that trains on it."""
    style = Style(str(toy_tokenizer().chat_template), "{said}", "<|im_end|>")
    save_toy_target(tmp_path / "target")
    tokens = write_out(toy_tokenizer(), "yes<|im_end|>", spelled=False)
    run = run_of(tmp_path / "target", tmp_path, style, **data)
    answer(run, tmp_path, {"0": [{"tokens": tokens, "finished": True}]}, ("Hi",))
    return run


def change(path: Path, **values: Any) -> None:
    row = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**row, **values}.items() if v is not None}))


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("part", ["weights or config", "tokenizer", "chat template"])
def test_tokens_of_another_target_are_refused_by_name(tmp_path: Path, part: str) -> None:
    run = toy_answers(tmp_path)
    assert len(trained(run)) == 1
    shutil.rmtree(tmp_path / "target")
    save_toy_target(tmp_path / "target", seed=part == "weights or config")
    tokenizer = toy_tokenizer()
    if part == "tokenizer":
        tokenizer.eos_token = "<|endoftext|>"
    if part == "chat template":
        tokenizer.chat_template = "{{ bos_token }}" + str(tokenizer.chat_template)
    tokenizer.save_pretrained(tmp_path / "target")
    with pytest.raises(DataError) as error:
        trained(run)
    assert str(error.value).startswith("answers.jsonl:1: its tokens were written with another ")
    assert f"{part} than this run's" in str(error.value)
    assert "Answer the prompts with this target: specforge regenerate" in str(error.value)
    # what the message says: without them the text is trained on
    assert "jq -c 'del(.token_rows)'" in str(error.value)
    change(tmp_path / "answers.jsonl", token_rows=None)
    (row,) = trained(run)
    assert row.loss_mask.sum() == 4


@pytest.mark.usefixtures("scripted")
def test_arguments_of_the_template_and_the_date_may_differ(tmp_path: Path) -> None:
    """They are in the tokens: files with and without thoughts are trained on together."""
    run = toy_answers(tmp_path)
    data = {"chat_template_kwargs": {"enable_thinking": False}, "now": "2030-01-01"}
    other = run.model_copy(update={"data": DataConfig(train=run.data.train, **data)})
    assert [p.input_ids.tolist() for p in trained(other)] == [
        p.input_ids.tolist() for p in trained(run)
    ]
    row = json.loads((tmp_path / "answers.jsonl").read_text())
    assert row["sampling"]["chat_template_kwargs"] == {}


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ([], "'token_rows' is no list"),
        ("x", "'token_rows' is no list"),
        ([5], "'input_ids' is no list of token ids"),
        ([{"input_ids": [], "loss_mask": []}], "'input_ids' is no list"),
        ([{"input_ids": [1, -1], "loss_mask": [0, 1]}], "'input_ids' is no list"),
        ([{"input_ids": [1, 2.0], "loss_mask": [0, 1]}], "'input_ids' is no list"),
        ([{"input_ids": [1, True], "loss_mask": [0, 1]}], "'input_ids' is no list"),
        ([{"input_ids": [1, 2**31], "loss_mask": [0, 1]}], "'input_ids' is no list"),
        ([{"input_ids": [1, 2], "loss_mask": [1]}], "'loss_mask' is no list of 2"),
        ([{"input_ids": [1, 2]}], "'loss_mask' is no list of 2"),
        ([{"input_ids": [1, 2], "loss_mask": [0, 2]}], "other values than 0 and 1"),
        ([{"input_ids": [1, 260], "loss_mask": [0, 1]}], "token id 260 is beyond"),
    ],
)
def test_damaged_tokens_are_named(tmp_path: Path, damaged: Any, message: str) -> None:
    run = toy_answers(tmp_path)
    change(tmp_path / "answers.jsonl", token_rows=damaged)
    with pytest.raises(DataError, match=rf"^answers\.jsonl:1: .*{message}"):
        trained(run)


@pytest.mark.usefixtures("scripted")
def test_tokens_are_cut_to_the_longest_sample(tmp_path: Path) -> None:
    run = toy_answers(tmp_path)
    (whole,) = trained(run)
    limit = len(whole.input_ids) - 1
    short = run.model_copy(update={"data": DataConfig(train=run.data.train, max_length=limit)})
    (cut,) = trained(short)
    assert cut.input_ids.tolist() == whole.input_ids.tolist()[:limit]
    refuse = DataConfig(train=run.data.train, max_length=limit, too_long="raise")
    with pytest.raises(DataError, match=rf"{limit + 1} tokens, longer than data\.max_length"):
        trained(run.model_copy(update={"data": refuse}))


@pytest.mark.usefixtures("scripted")
def test_text_of_a_cut_answer_has_no_end(tmp_path: Path) -> None:
    run = toy_answers(tmp_path)
    change(tmp_path / "answers.jsonl", token_rows=None, finish_reason=["length"])
    (row,) = trained(run)
    assert toy_tokenizer().decode(row.input_ids[row.loss_mask.bool()]) == "yes"


@pytest.mark.usefixtures("scripted")
def test_prompts_of_an_earlier_regeneration(tmp_path: Path) -> None:
    """Their tokens are another's: none of them stay in what is written."""
    run = toy_answers(tmp_path)
    change(tmp_path / "answers.jsonl", retokenized=True)
    shutil.move(tmp_path / "answers.jsonl", tmp_path / "p.jsonl")
    other = write_out(toy_tokenizer(), "no<|im_end|>", spelled=False)
    (tmp_path / "script.json").write_text(json.dumps({"0": [{"tokens": other, "finished": True}]}))
    regenerate(run, Strategy.load("linear"), tmp_path / "answers.jsonl")
    row = json.loads((tmp_path / "answers.jsonl").read_text())
    assert "retokenized" not in row
    ((_, written),) = supervised(trained(run))
    assert written == other


@pytest.mark.usefixtures("scripted")
def test_tokens_that_were_made_of_text_are_said_to_be(tmp_path: Path) -> None:
    style = Style(str(toy_tokenizer().chat_template), "{said}", "<|im_end|>")
    save_toy_target(tmp_path / "target")
    tokens = write_out(toy_tokenizer(), "yes<|im_end|>", spelled=False)
    given = {"tokens": tokens, "finished": True, "retokenized": True}
    report = answer(run_of(tmp_path / "target", tmp_path, style), tmp_path, {"0": [given]}, ("Hi",))
    assert "1 tokenized anew (the server gives no token ids)" in str(report)
    assert json.loads((tmp_path / "answers.jsonl").read_text())["retokenized"] is True


CHANNELLED = "<|channel|>commentary"
BEGINS = "<|start|>assistant"


@pytest.mark.parametrize(
    ("text", "content", "thought", "calls"),
    [
        ("plain <|channel|>", "plain <|channel|>", None, []),
        (" to=functions.f and more", " to=functions.f and more", None, []),
        (STYLES["harmony"].writes.format(thought="t", said="s"), "s", "t", []),
        ("<|channel|>final<|message|>s", "s", None, []),
        ("<|channel|>analysis<|message|>cut o", "", "cut o", []),
        (f"<|channel|>analysis<|message|>t<|end|>{BEGINS}<|chan", "", "t", []),
        (
            f"{CHANNELLED}<|message|>I look.<|end|>{BEGINS}{CHANNELLED} "
            'to=functions.f <|constrain|>json<|message|>{"a": 1}',
            "I look.",
            None,
            [("f", {"a": 1})],
        ),
        (
            "<|channel|>analysis<|message|>t<|end|>"
            f"{BEGINS} to=functions.f{CHANNELLED} json<|message|>{{}}<|call|>"
            f"{BEGINS} to=functions.g{CHANNELLED}<|message|>{{}}",
            "",
            "t",
            [("f", {}), ("g", {})],
        ),
        (f' to=functions.f{CHANNELLED} json<|message|>{{"a": 1}}', "", None, [("f", {"a": 1})]),
        (f' to=functions.f{CHANNELLED} json<|message|>{{"a": ', "", None, []),  # cut off
        ("<|channel|>analysis to=python code<|message|>print(1)", "", None, []),
        ("<|channel|>final<|message|>a\n<b>", "a\n<b>", None, []),
    ],
)
def test_answers_in_channels(
    text: str, content: str, thought: str | None, calls: list[tuple[str, Any]]
) -> None:
    expected: dict[str, Any] = {"role": "assistant", "content": content}
    if thought:
        expected["reasoning_content"] = thought
    if calls:
        made = [{"name": name, "arguments": arguments} for name, arguments in calls]
        expected["tool_calls"] = [{"type": "function", "function": one} for one in made]
    assert as_message(text) == expected
