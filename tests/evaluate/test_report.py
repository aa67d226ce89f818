from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console

from specforge_core.evaluate.decode import Answer, DecodeStats
from specforge_core.evaluate.lossless import Difference
from specforge_core.evaluate.report import EvalReport, PromptResult, Setup, render, summarize
from specforge_core.testing.close import close


def setup(temperature: float = 0.0) -> Setup:
    return Setup("mine", "models/tiny", temperature, "float32", "cpu", 16, 3, 1)


def result(
    stats: DecodeStats, *, alone: bool = True, difference: Difference | None = None
) -> PromptResult:
    answer = Answer((1, 2), stats)
    plain = Answer((1, 2), DecodeStats(new_tokens=10, seconds=2.0)) if alone else None
    return PromptResult("p.jsonl:3", answer, plain, difference)


FIRST = DecodeStats(2, 6, (2, 2, 2), (2, 1, 1), 10, 0.5)
SECOND = DecodeStats(4, 6, (4, 4, 4), (2, 0, 0), 10, 1.5)
MISMATCH = Difference(4, 7, 9, 1.25, tie=False)
TIE = Difference(4, 7, 9, 0.0625, tie=True)


def report(*results: PromptResult, temperature: float = 0.0) -> EvalReport:
    return summarize(setup(temperature), {"chat": list(results)})


def shown(found: EvalReport) -> str:
    out = StringIO()
    Console(file=out, width=120).print(render(found))
    return out.getvalue()


def test_the_mean_is_over_all_verifications_not_over_sets() -> None:
    found = summarize(setup(), {"chat": [result(FIRST)], "code": [result(SECOND)]})
    assert found.acceptance_length == 2.0  # 12 tokens by 6 verifications; the sets' mean is 2.25
    assert found.per_set["chat"].acceptance_length == 3.0
    assert found.per_set["code"].acceptance_length == 1.5
    close(found.per_position, (4 / 6, 1 / 6, 1 / 6), terms=1)
    assert (found.drafted, found.accepted, found.num_prompts) == (18, 6, 2)
    assert found.tokens_per_second == 10.0
    assert found.baseline_tokens_per_second == 5.0


def test_json_has_the_promised_keys_and_is_strict() -> None:
    found = summarize(setup(), {"chat": [result(FIRST)], "none": [result(DecodeStats())]})
    data = json.loads(found.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert data.keys() >= {
        "acceptance_length",
        "per_set",
        "lossless",
        "per_position",
        "drafted",
        "accepted",
        "tokens_per_second",
        "baseline_tokens_per_second",
        "num_prompts",
        "ties",
    }
    assert data["lossless"] is True
    assert data["per_set"]["chat"]["per_position"] == [1.0, 0.5, 0.5]
    assert data["per_set"]["none"]["acceptance_length"] is None  # nothing was verified
    assert data["per_set"]["none"]["tokens_per_second"] is None


def test_lossless_is_true_only_when_every_answer_was_equal() -> None:
    assert report(result(FIRST)).lossless is True
    found = report(result(FIRST), result(SECOND, difference=MISMATCH))
    assert found.lossless is False
    assert found.lossless_reason == "1 of 2 greedy answers equal the target's own"
    assert found.differences == (
        "p.jsonl:3: mismatch at token 4: 7 for 9, 1.25 below the target's best logit",
    )
    assert found.per_set["chat"].mismatches == 1


def test_ties_are_counted_and_no_mismatch() -> None:
    found = report(result(FIRST), result(SECOND, difference=TIE))
    assert (found.lossless, found.ties) == (True, 1)
    assert found.lossless_reason == (
        "2 of 2 greedy answers equal the target's own, 1 of them up to a tie of the target's "
        "two best"
    )
    assert found.differences[0].startswith("p.jsonl:3: tie at token 4")


def test_lossless_is_null_with_a_reason_when_it_was_not_compared() -> None:
    sampled = report(result(FIRST), temperature=0.7)
    assert sampled.lossless is None
    assert "sampled answers differ" in sampled.lossless_reason
    assert sampled.baseline_tokens_per_second == 5.0
    for skipped in (
        report(result(FIRST, alone=False)),
        report(result(FIRST), result(FIRST, alone=False)),
    ):
        assert skipped.lossless is None
        assert skipped.lossless_reason == "not compared. Try: eval.compare=true"


def test_people_see_a_table() -> None:
    found = summarize(
        setup(), {"chat": [result(FIRST)], "code": [result(SECOND, difference=MISMATCH)]}
    )
    text = shown(found)
    assert "mine on models/tiny, greedy, float32" in text
    rows = {line.split()[1]: line.split() for line in text.splitlines() if line.startswith("│ ")}
    assert rows["chat"][5] == "3.000"
    assert rows["all"][5] == "2.000"
    assert "2.00x" in rows["all"]
    assert "accepted by position: 0.67 0.17 0.17" in text
    assert "lossless: 1 of 2 greedy answers equal the target's own" in text
    assert "p.jsonl:3: mismatch at token 4: 7 for 9" in text


def test_a_tree_is_told_by_the_tokens_that_were_verified() -> None:
    tree = DecodeStats(4, 9, (4, 4, 2), (3, 2, 0), 9, 1.0, nodes=50)
    found = report(result(tree), result(tree))
    assert (found.nodes, found.drafted, found.accepted) == (100, 20, 10)
    told = "a verification: 12.50 tokens of a tree, on 2.50 levels, 1.25 accepted"
    assert told in shown(found)
    chain = DecodeStats(2, 6, (2, 2, 2), (2, 1, 1), 10, 0.5, nodes=6)
    assert "of a tree" not in shown(report(result(chain)))


def test_a_table_of_sampled_answers_says_so() -> None:
    text = shown(report(result(FIRST, alone=False), temperature=0.7))
    assert "temperature 0.7" in text
    assert "sampled answers differ" in text


def test_stats_add_up_over_answers_of_different_drafts() -> None:
    first = DecodeStats(2, 5, (2, 2, 1), (2, 1, 0), 6, 1.0)
    second = DecodeStats(1, 2, (1,), (1,), 3, 0.5)
    total = first + second
    assert total == DecodeStats(3, 7, (3, 2, 1), (3, 1, 0), 9, 1.5)
    assert total.acceptance_length is not None
    close(total.acceptance_length, 7 / 3, terms=1)
    assert total.per_position == (1.0, 0.5, 0.0)
    assert total.tokens_per_second == 6.0
    assert (total.drafted, total.accepted) == (6, 4)
