"""What a chat template leaves out of a conversation is told, and the form of texts it wants."""

from __future__ import annotations

import re
from typing import Any

import pytest

from specforge_core.data.chat import Encoder
from specforge_core.data.sources import BadRow, Message
from specforge_core.testing.toy import toy_tokenizer

ASK = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
WRITES = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
OPENS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}" + WRITES + "{% endfor %}" + OPENS
# in the manner of those of LLaVA: texts are taken from lists of parts alone
PARTS = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p['text'] }}{% endfor -%}
{{ '<|im_end|>\n' }}{% endfor %}"""
# others take the first part, which a plain text has none of
FIRST = """{% for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + m.content[0].text + '<|im_end|>\n' }}{% endfor %}"""
EITHER = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text + '!' }}{% endif -%}
{{ '<|im_end|>\n' }}{% endfor %}"""
# one call a message, no text beside it, no results of tools, no system prompt but the first
NARROW = (
    "{% for m in messages %}{% if m.tool_calls %}"
    "{{ '<|im_start|>assistant\n' + m.tool_calls[0].function|tojson + '<|im_end|>\n' }}"
    "{% elif m.role in ('user', 'assistant') or loop.first and m.role == 'system' %}"
    + WRITES
    + "{% endif %}{% endfor %}"
    + OPENS
)
# a text or a call, thoughts are not written, and of a tool's result or a system prompt a beginning
SHORT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] or m.tool_calls|tojson }}"
    "{% else %}{{ m.content[:9] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + OPENS
)


def encoder(template: str, **options: Any) -> Encoder:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = template
    return Encoder(tokenizer, options)


def calls(*names: str, text: str = "") -> Message:
    listed = [{"type": "function", "function": {"name": name, "arguments": {}}} for name in names]
    return {"role": "assistant", "content": text, "tool_calls": listed}


@pytest.mark.parametrize("template", [PARTS, FIRST, EITHER, "{% for m in messages %}" + WRITES])
def test_a_template_gets_texts_in_the_form_it_reads(template: str) -> None:
    end = "" if template.endswith("endfor %}") else "{% endfor %}"
    made = encoder(template + end + OPENS)
    (row,) = made.rows([ASK, ANSWER, ASK, {**ANSWER, "content": "b"}])
    turn = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    assert made.tokenizer.decode(row.input_ids) == turn.format("a") + turn.format("b")
    answer = made.tokenizer("a<|im_end|>b<|im_end|>")["input_ids"]
    marked = zip(row.input_ids, row.loss_mask, strict=True)
    assert [token for token, on in marked if on] == answer


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        ([ASK, calls("f", "g"), ASK, ANSWER], "message 2.* its call 2 "),
        ([ASK, calls("f", text="let me see"), ASK, ANSWER], "message 2.* its text "),
        ([ASK, ANSWER, {"role": "tool", "content": "sun"}, ANSWER], "message 3.* its text "),
        ([ASK, ANSWER, {"role": "system", "content": "s"}, ASK, ANSWER], "message 3.* its text "),
        ([ASK, {**ANSWER, "reasoning_content": "hm"}], "message 2.* its reasoning "),
    ],
)
@pytest.mark.parametrize("turns", [0, 12])
def test_what_a_template_leaves_out_is_told(chat: list[Message], said: str, turns: int) -> None:
    made = encoder(NARROW)
    said = said if not turns else said.partition(".*")[2]  # the number is another one
    for _ in range(2):  # what is known of a template is kept
        with pytest.raises(BadRow, match=said + r".*data\.on_error=skip") as error:
            made.rows([ASK, ANSWER] * turns + chat)
        assert error.value.reason == "not written by the chat template"


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        ([ASK, calls("f", text="let me see")], "message 2.* its call 1 "),
        (
            [ASK, {**ANSWER, "content": "<think>\nhm\n</think>\n\na"}],
            "message 2.* its text before '</think>' ",
        ),
    ],
)
def test_what_was_written_of_another_message_says_nothing_of_this_one(
    chat: list[Message], said: str
) -> None:
    """A template may write either of two parts; what was refused once is not refused for all."""
    made = encoder(SHORT)
    result = {"role": "tool", "content": "a result that is cut off"}
    fine = [ASK, calls("f"), result, {**ANSWER, "content": "<think>\n\n</think>\n\na"}]
    for _ in range(2):
        assert len(made.rows(fine)) == 1
        with pytest.raises(BadRow, match=said + ".*specforge regenerate"):
            made.rows(chat)


CUTS = "{% set said = m.content.split(CLOSE)[-1] %}"
MARKS = ("</think>", "[/THINK]", "<|/think|>", "</thinking>", "\u25c1/think\u25b7", "</seed:think>")


@pytest.mark.parametrize("mark", [*MARKS, "<|END_THINKING|>", "<|channel|>final<|message|>"])
def test_thoughts_are_closed_by_what_the_template_takes_a_text_apart_at(mark: str) -> None:
    """No list of marks: those that a template's own source names."""
    writes = CUTS.replace("CLOSE", f"'{mark}\n'") + WRITES.replace("m.content", "said")
    made = encoder("{% for m in messages %}" + writes + "{% endfor %}" + OPENS)
    for blank in ("", "\n", "<think>\n\n", "[THINK]", "\u25c1think\u25b7 \n"):
        assert len(made.rows([ASK, {**ANSWER, "content": f"{blank}{mark}\na"}])) == 1
    said = re.escape(
        f"message 2: the target's chat template does not write its text before {mark!r}"
    )
    with pytest.raises(BadRow, match=said):
        made.rows([ASK, {**ANSWER, "content": f"hm\n{mark}\na"}])
    assert len(encoder(CHATML).rows([ASK, {**ANSWER, "content": f"hm\n{mark}\na"}])) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("well <think>hm</think>a", "its text before '<think>'"),
        ("<think>hm</think>a</think>b", "its text before the last '</think>'"),
        ("<think>hm</think>a<answer>b", "its text behind the last mark"),
        ("<think>hm</think>a", None),
        ("<think>\n\n</think>\n\na", None),
        ("\n<think>hm</think>", None),
    ],
)
def test_every_piece_of_an_answer_that_a_template_takes_apart_is_looked_at(
    text: str, said: str | None
) -> None:
    parts = (
        "{% set t = m.content.split('</think>')[0].split('<think>')[-1] %}"
        "{% set a = m.content.split('</think>')[-1].split('<answer>')[0] %}"
    )
    writes = WRITES.replace("m.content", "'<think>' + t + '</think>' + a")
    made = encoder(
        "{% for m in messages %}{% if '</think>' in m.content %}"
        f"{parts}{writes}{{% else %}}{WRITES}{{% endif %}}{{% endfor %}}{OPENS}"
    )
    for _ in range(2):  # what is known of a template is kept
        assert len(made.rows([ASK, ANSWER])) == 1
        if said is None:
            assert len(made.rows([ASK, {**ANSWER, "content": text}])) == 1
        else:
            with pytest.raises(BadRow, match=re.escape(said)):
                made.rows([ASK, {**ANSWER, "content": text}])


@pytest.mark.parametrize(
    ("change", "text", "lost"),
    [
        (".replace('</think>', '')", "<think>\nhm\n</think>\n\na", "</think>"),
        (".replace('<think>', '').replace('</think>', '')", "<think>hm</think>a", "</think>"),
        (".split('</think>')|join('\n')", "hm</think>a</think>hma", "</think>"),
        (".replace('<think>', '')", "so <think>hm</think>a", "<think>"),
        # marks of its own, and what a prompt holds
        (".replace('<think>', '[T]').replace('</think>', '[/T]')", "<think>hm</think>a", None),
        (".replace('<think>', '')", "<think>\nhm</think>a", None),
        (".replace('</think>', '</think>\n')", "hm</think>a", None),
        (".replace('</think>', '')", "<think></think>a", None),
    ],
)
def test_a_mark_between_two_texts_is_not_lost(change: str, text: str, lost: str | None) -> None:
    writes = WRITES.replace("m.content", f"(m.content{change})")
    made = encoder("{% for m in messages %}" + writes + "{% endfor %}" + OPENS)
    chat = [ASK, {**ANSWER, "content": text}]
    if lost is None:
        assert len(made.rows(chat)) == 1
    else:
        with pytest.raises(BadRow, match=f"message 2: .* does not write its mark '{lost}'"):
            made.rows(chat)


@pytest.mark.parametrize("change", ["[:5]", "|upper", "|striptags", "|replace('o', '0')"])
@pytest.mark.parametrize("text", ["a long <b>text</b>", "hm</think>a long <b>text</b>"])
def test_an_answer_is_not_written_as_another_text(change: str, text: str) -> None:
    """Also behind an answer that the template writes as it is."""
    made = encoder(
        "{% for m in messages %}"
        + WRITES.replace("m.content", f"(m.content{change})")
        + "{% endfor %}"
        + OPENS
        + "{% set close = '</think>' %}"
    )
    assert len(made.rows([{**ASK, "content": "A"}, {**ANSWER, "content": "1"}])) == 1
    with pytest.raises(BadRow, match=r"message 2: .* does not write its text"):
        made.rows([ASK, {**ANSWER, "content": text}])


@pytest.mark.parametrize("text", ["a\n\nb", " a ", "<think>\na", ""])
def test_spaces_may_be_others_and_a_prompt_may_hold_the_beginning(text: str) -> None:
    spaces = WRITES.replace("m.content", "m.content.strip().replace('\n\n', '\n')")
    opens = OPENS.replace("assistant\n", "assistant\n<think>\n" if "<" in text else "assistant\n")
    made = encoder("{% for m in messages %}" + spaces + "{% endfor %}" + opens)
    assert len(made.rows([ASK, {**ANSWER, "content": text}])) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        # as DeepSeek's do, which were made for arguments that are a text
        ("'\n```json\n' + c.arguments + '\n```'", r"It joins the arguments of a call to a text"),
        ("' ' ~ c.arguments", r"message 2: .* as Python does, \{'at': 'it', 'deep'"),
        # each argument of its own
        (
            "c.arguments.items()|map('join', '=')|join(' ')",
            r"Python does, \{'in': True, 'no': \[None",
        ),
        ("' ' + c.arguments|tojson", None),
        ("' ' + (c.arguments if c.arguments is string else c.arguments|tojson)", None),
        # a call of Python, as Llama's and Gemma's may be
        ("'(' + c.arguments.items()|map('join', '=')|join(', ') + ')'", None),
    ],
)
def test_the_arguments_of_a_call_are_written_as_json(arguments: str, said: str | None) -> None:
    call = "{% for d in m.tool_calls %}{% set c = d.function %}{{ c.name + ARGUMENTS }}{% endfor %}"
    opened, closed = WRITES.split(" + m.content + ")
    made = encoder(
        "{% for m in messages %}" + opened + " + m.content }}"
        f"{call.replace('ARGUMENTS', arguments)}{{{{ {closed}{{% endfor %}}{OPENS}"
    )
    chat = [ASK, calls("f")]
    deep = {"in": True, "no": [None]}
    chat[1]["tool_calls"][0]["function"]["arguments"] = {"at": "it", "deep": deep, "code": "['a']"}
    if said is None:
        assert len(made.rows(chat)) == 1
        chat[1]["tool_calls"][0]["function"]["arguments"] = {"it's": 1}  # in Python, too
        assert len(made.rows(chat)) == 1
        return
    with pytest.raises(BadRow, match=said + r".*`arguments \| tojson`.*data\.on_error=skip"):
        made.rows(chat)


def test_an_answer_with_special_tokens_in_its_text_is_regenerated() -> None:
    template = "{% if '<|im_end|>' in messages[-1].content %}{{ raise_exception('no tags!') }}"
    made = encoder(template + "{% endif %}{% for m in messages %}" + WRITES + "{% endfor %}")
    with pytest.raises(BadRow, match=r"no tags!\. Message 2 has '<\|im_end\|>' .*specforge regen"):
        made.rows([ASK, {**ANSWER, "content": "hm<|im_end|>a"}])
    with pytest.raises(BadRow, match=r"no tags!\. Correct it"):
        made.rows([{**ASK, "content": "<|im_end|>"}, ANSWER])


@pytest.mark.parametrize(
    "chat",
    [
        [{"role": "system", "content": "s"}, ASK, ANSWER],
        [ASK, calls("f"), ASK, ANSWER],
        [ASK, {**ANSWER, "content": " "}, ASK, ANSWER],  # nothing is left out of nothing
        [ASK, ANSWER, {"role": "tool", "content": "behind all that is trained on"}],
    ],
)
def test_what_is_written_is_no_error(chat: list[Message]) -> None:
    assert len(encoder(NARROW).rows(chat)) == 1


def test_thoughts_that_later_turns_drop_are_written() -> None:
    """Each answer is looked at where it ends the conversation."""
    drops = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    )
    chat = [ASK, {**ANSWER, "content": "hm</think>a"}]
    assert len(encoder(drops + OPENS).rows(chat * 2)) == 2


@pytest.mark.parametrize("behind", ["more", "\n<|im_start|>user\nq<|im_end|>"])
def test_nothing_is_trained_on_behind_the_end_of_an_answer(behind: str) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = CHATML
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    made = Encoder(tokenizer, {}, ends=frozenset({end}))
    said = "message 2: '<|im_end|>' in its text ends an answer, and the target never writes"
    with pytest.raises(BadRow, match=re.escape(said)) as caught:
        made.rows([ASK, {**ANSWER, "content": f"a<|im_end|>{behind}"}])
    assert caught.value.reason == "text behind the end of an answer"
    made.rows([{**ASK, "content": f"a<|im_end|>{behind}"}, ANSWER])  # a user may write anything
    plain = made.rows([ASK, ANSWER])
    for doubled in ("a<|im_end|>", "a<|im_end|>\n<|im_end|>"):
        (row,) = made.rows([ASK, {**ANSWER, "content": doubled}])
        trained = [i for i, on in zip(row.input_ids, row.loss_mask, strict=True) if on]
        both = zip(plain[0].input_ids, plain[0].loss_mask, strict=True)
        assert trained == [i for i, on in both if on]
