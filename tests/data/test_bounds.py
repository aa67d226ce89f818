"""A chat template is a program: it may not end, or fill the memory, and then its row is wrong."""

from __future__ import annotations

import json
import resource
import signal
import threading
import time
from pathlib import Path

import pytest

from specforge_core.config import DataConfig
from specforge_core.data import chat
from specforge_core.data.bounds import bounded_memory, bounded_time
from specforge_core.data.chat import Encoder
from specforge_core.data.files import open_source
from specforge_core.data.sources import BadRow
from specforge_core.testing.toy import TEMPLATE, toy_tokenizer

from .prompted import load_prompts

# the end of time or of memory may meet a callback of the garbage collector: Python says so and goes
# on, and the next allocation, or the next second, raises it again
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = (
    "{% set n = namespace(s='xx') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}"
)
# what a template does, and what is said of it
WRONG = {
    "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
    "{% for i in range(10 ** 9) %}{% endfor %}": "OverflowError: Range too big",
    "{{ 'x' * 10 ** 12 }}": "MemoryError",
    DOUBLE: "MemoryError",
    "{{ ('a' * 10 ** 6) | replace('a', 'b' * 10 ** 6) }}": "MemoryError",
    "{{ 'a' | center(10 ** 12) }}": "MemoryError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError: ",
    LOOP: "does not come to an end: it took more than 0.5 s",
    "{{ 10 ** (10 ** 8) }}": "does not come to an end: it took more than 0.5 s",
    "{{ messages.__class__.__mro__ }}": "access to attribute '__class__' of 'list' object is unsaf",
    "{% import 'x' as y %}": "no loader for this environment specified",
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("on_error", ["skip", "raise"])
def test_a_row_whose_template_goes_wrong_is_no_more_than_a_bad_row(
    tmp_path: Path, wrong: str, on_error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # short for what does not end alone: filling the memory takes about half a second, too
    if "does not come to an end" in WRONG[wrong]:
        monkeypatch.setattr(chat, "SECONDS", 0.5)
    monkeypatch.setattr(chat, "MEMORY", 1 << 28)
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = "{% if 'bad' in messages[0].content %}" + wrong + "{% endif %}"
    tokenizer.chat_template += TEMPLATE
    rows = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
        for text in ("good", "bad", "good again")
    ]
    Encoder(tokenizer, {}).rows(rows[0])  # what the first row of a process costs
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    data = DataConfig.model_validate({"train": (str(path),), "on_error": on_error})
    began = time.process_time()
    if on_error == "skip":
        found = load_prompts(data, tokenizer, 260, lambda source, _: open_source(source))
        assert len(found) == 2
        assert found.skipped == {"refused by the chat template": 1}
    else:
        with pytest.raises(BadRow, match=r"^rows\.jsonl:2: the chat template ") as error:
            load_prompts(data, tokenizer, 260, lambda source, _: open_source(source))
        assert WRONG[wrong] in str(error.value)
    assert time.process_time() - began < 30


def test_what_swallows_the_first_end_gets_another() -> None:
    def swallow() -> None:
        try:
            while True:
                pass
        except TimeoutError:
            while True:
                pass

    before = signal.getsignal(signal.SIGPROF)
    with pytest.raises(TimeoutError), bounded_time(0.1):
        swallow()
    assert signal.getsignal(signal.SIGPROF) == before
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


def test_other_threads_have_no_bound_and_change_nothing() -> None:
    def work() -> None:
        with bounded_time(0.01):
            until = time.thread_time() + 0.1
            while time.thread_time() < until:
                pass
        ended.append(True)

    ended: list[bool] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended


def test_the_memory_is_free_again() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), bounded_memory(1 << 26):
        bytearray(1 << 27)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(bytearray(1 << 27)) == 1 << 27
