"""`specforge data`, as a person runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from specforge_core.data.prompts import run_prompts
from specforge_core.data.report import OFF, ON, report_data
from specforge_core.load import load_config
from specforge_core.target.info import load_target_info
from specforge_core.testing.forked import cli
from specforge_core.testing.runs import finish, write_run


@pytest.fixture
def config(tmp_path: Path, toy_target: Path) -> Path:
    found = write_run(tmp_path, toy_target, conversations=8, strategy={"name": "linear"})
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("{\n")
        row = {"input_ids": [97, 98, 99, 100], "loss_mask": [0, 1, 1, 0]}
        file.write(json.dumps(row) + "\n")
    return found


def test_the_numbers(config: Path) -> None:
    report = report_data(*load_config(config, ("data.on_error=skip",)))
    found: dict[str, Any] = report.as_json()
    lengths = sorted(len(prompt.input_ids) for prompt in report.prompts)
    assert found["conversations"] == found["rows"] == 9
    assert list(found["sources"].values()) == [9]
    assert found["skipped"] == {"not JSON": 1}
    assert found["tokens"] == sum(lengths)
    assert found["supervised"] == sum(int(p.loss_mask.sum()) for p in report.prompts)
    assert found["lengths"] == {
        "0%": 4,
        "50%": lengths[4],
        "90%": lengths[7],
        "99%": lengths[8],
        "100%": lengths[8],
    }
    share = found["supervised"] / found["tokens"]
    assert f"{found['supervised']:,} supervised ({share:.1%})" in str(report)
    assert "skipped: 1 not JSON" in str(report)
    cut = report_data(*load_config(config, ("data.on_error=skip", "data.max_length=40")))
    assert cut.prompts.told.cut == sum(len(p.input_ids) == 40 for p in cut.prompts) > 0
    assert f"cut to 40 tokens: {cut.prompts.told.cut} rows" in str(cut)
    assert "cut: none" in str(report)


def test_what_is_held_out_is_told(config: Path) -> None:
    every = report_data(*load_config(config, ("data.on_error=skip",)))
    part = report_data(*load_config(config, ("data.on_error=skip", "data.validation=0.5")))
    assert every.as_json()["held_out"] == 0
    assert "held out by data.validation: none" in str(every)
    few = report_data(*load_config(config, ("data.on_error=skip", "data.validation=1e-9")))
    assert "none, so that training is refused; the least part with one is 0." in str(few)
    held_out = len(every.prompts) - len(part.prompts)
    assert part.as_json()["held_out"] == held_out > 0
    assert f"held out by data.validation: {held_out}" in str(part)


def test_a_part_is_held_out_of_the_files_that_are_trained_on(config: Path, tmp_path: Path) -> None:
    """And of none that is left out for its name."""
    rows = [{"input_ids": [n, 98, 99], "loss_mask": [0, 1, 1]} for n in range(20)]
    folder = tmp_path / "d"  # the test's own name is one of what is held out
    folder.mkdir()
    (tmp_path / "train.jsonl").rename(folder / "train.jsonl")
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = ("data.on_error=skip", f"data.train=[{folder}/t*.jsonl]", "data.validation=0.5")
    run, strategy = load_config(config, more)
    report = report_data(run, strategy)
    target = load_target_info(run.target)
    held_out = run_prompts(run, strategy, target, report.tokenizer, validation=True).load()
    assert held_out.told.conversations == report.prompts.told.other_side > 0


def test_what_is_supervised_is_set_off(config: Path) -> None:
    report = report_data(*load_config(config, ("data.on_error=skip",)))
    *_, last = report.rows(9, colour=True)
    tokens = [report.tokenizer.decode([token]) for token in (97, 98, 99, 100)]
    body = "".join(map(str, tokens))
    assert last.plain == f"row 8: 4 tokens, 2 supervised\n{body}"
    styles = [(last.plain[span.start : span.end], span.style) for span in last.spans]
    assert styles == [(tokens[0], OFF), (f"{tokens[1]}{tokens[2]}", ON), (tokens[3], OFF)]
    *_, plain = report.rows(9, colour=False)
    assert plain.plain.endswith(f"\n{tokens[0]}⟦{tokens[1]}{tokens[2]}⟧{tokens[3]}")
    console = Console(force_terminal=True, width=80)
    with console.capture() as shown:
        console.print(last)
    assert "\x1b[1;32m" in shown.get()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc\r\n", "a\tb\nc\\x0d\n"),
        ("\x1b[2Jgone\x07\x08", "\\x1b[2Jgone\\x07\\x08"),
        ("\x7f\x9b31m", "\\x7f\\x9b31m"),
        ("\u202eback\u2066x\u2069\u200f", "\\u202eback\\u2066x\\u2069\\u200f"),
        ("\u2028\ufeff\U000e0041", "\\u2028\\ufeff\\U000e0041"),
        ("é 你 \u200d🙂", "é 你 \u200d🙂"),
    ],
)
@pytest.mark.parametrize("colour", [True, False])
def test_what_a_terminal_would_obey_is_escaped(
    config: Path, text: str, shown: str, colour: bool
) -> None:
    line = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "A"}]}
    (config.parent / "train.jsonl").write_text(json.dumps(line) + "\n")
    (row,) = report_data(*load_config(config, ())).rows(1, colour=colour)
    assert shown in row.plain
    assert text == shown or text not in row.plain


def test_the_command(config: Path) -> None:
    said = finish(cli("data", "-c", str(config), "--show", "2", "data.on_error=skip"))
    assert "9 conversations, 9 rows to train on" in said
    assert said.count("⟦") == 2
    found = json.loads(finish(cli("data", "-c", str(config), "--json", "data.on_error=skip")))
    assert found["rows"] == 9
    bad = cli("data", "-c", str(config))
    assert "train.jsonl:9 is not a line of JSON" in bad.communicate()[1]
    assert bad.returncode == 2


def test_arguments_that_the_template_does_not_read_are_told(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = "data.chat_template_kwargs={enable_thinkin: false, add_generation_prompt2: 1}"
    report_data(*load_config(config, ("data.on_error=skip", given)))
    told = " ".join(capsys.readouterr().err.split())
    assert "does not read 'enable_thinkin', 'add_generation_prompt2' of" in told
    report_data(*load_config(config, ("data.on_error=skip",)))
    assert "does not read" not in capsys.readouterr().err
