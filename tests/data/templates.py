"""Chat templates in the manner of published ones, with what their targets write."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from .bpe import trained_bpe

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# thoughts of earlier turns are dropped, and the last turn gets empty ones where it has none
QWEN3 = """{%- if tools -%}
{{ '<|im_start|>system\n<tools>' + tools|tojson + '</tools><|im_end|>\n' }}{%- endif -%}
{%- set last = namespace(user=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- elif m.role != 'assistant' -%}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- else -%}
{%- set said, thought = m.content, m.reasoning_content or '' -%}
{%- if '</think>' in said -%}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
{%- set said = said.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{ '<|im_start|>assistant\n' }}
{%- if loop.index0 > last.user -%}{{ '<think>\n' + thought + '\n</think>\n\n' }}{%- endif -%}
{{ said }}
{%- for call in m.tool_calls or [] -%}
{{ '<tool_call>\n' + call.function|tojson + '\n</tool_call>' }}{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' + OPENS }}{%- endif -%}"""
QWEN3_HYBRID = QWEN3.replace(
    "OPENS", "('<think>\n\n</think>\n\n' if enable_thinking is false else '')"
)
QWEN3_THINKING = QWEN3.replace("OPENS", "'<think>\n'")
# the thoughts are opened by the prompt, and answers are written without any; behind the results
# of tools the target goes on at once
R1 = """{{ bos_token }}{%- if tools -%}{{ '## Tools\n' + tools|tojson }}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ ('' if loop.previtem.role == 'tool' else SAYS) + m.content.split('</think>')[-1] }}
{%- for call in m.tool_calls or [] -%}
{{ '<|call|>' + call.function.name + '<|sep|>' + call.function.arguments|tojson + '<|called|>' }}
{%- endfor -%}{{ eos_token }}
{%- elif m.role == 'tool' -%}{{ '<|output|>' + m.content + '<|called|>' }}
{%- else -%}{{ ('<|User|>' if m.role == 'user' else '') + m.content }}{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt and messages[-1].role != 'tool' -%}
{{ '<|Assistant|>' + OPENS }}{%- endif -%}"""
DEEPSEEK_31 = R1.replace("SAYS", "'<|Assistant|></think>'")
R1 = R1.replace("SAYS", "'<|Assistant|>'")
HARMONY = """{{ '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- if tools -%}{{ '<|start|>developer<|message|>' + tools|tojson + '<|end|>' }}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{{ '<|start|>functions.look to=assistant<|channel|>commentary<|message|>' }}
{{- m.content + '<|end|>' }}
{%- elif m.role != 'assistant' -%}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
{%- else -%}
{%- if '<|channel|>' in m.content -%}{{ raise_exception('no channels in content') }}{%- endif -%}
{%- if (loop.last or m.tool_calls) and m.reasoning_content -%}
{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}
{%- endif -%}
{%- if m.tool_calls -%}{%- set call = m.tool_calls[0].function -%}
{{ '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
{{- call.arguments|tojson + '<|call|>' }}
{%- else -%}
{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- endif -%}
{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}"""
LLAMA3 = """{{ bos_token + '<|head|>system<|headed|>\n\nToday: ' }}
{{- strftime_now('%d %b %Y') + '<|eot|>' }}
{%- if tools -%}{{ '<|head|>user<|headed|>\n\n' + tools|tojson + '<|eot|>' }}{%- endif -%}
{%- for m in messages -%}
{{ '<|head|>' + ('ipython' if m.role == 'tool' else m.role) + '<|headed|>\n\n' }}
{%- if m.tool_calls -%}{%- set call = m.tool_calls[0].function -%}
{{ {'name': call.name, 'parameters': call.arguments}|tojson }}
{%- else -%}{{ m.content|trim }}{%- endif -%}{{ '<|eot|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|head|>assistant<|headed|>\n\n' }}{%- endif -%}"""
GEMMA = """{{ bos_token }}{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('in turns!') }}
{%- endif -%}
{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content|trim + '<end>\n' }}
{%- endfor -%}{%- if add_generation_prompt -%}{{ '<turn>model\n' }}{%- endif -%}"""
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
# nothing ends a turn but the role of the next one
GLM4 = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GLM45 = """[gMASK]<sop>{%- if tools -%}{{ '<|system|>\n# Tools\n' + tools|tojson }}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|assistant|>\n<think></think>\n' + m.content.split('</think>')[-1].strip() }}
{%- for call in m.tool_calls or [] -%}
{{ '\n<tool_call>' + call.function.name + '\n' }}
{%- for key, value in call.function.arguments.items() -%}
{{ '<arg_key>' + key + '</arg_key>\n<arg_value>' + value + '</arg_value>\n' }}
{%- endfor -%}{{ '</tool_call>' }}{%- endfor -%}
{%- elif m.role == 'tool' -%}
{{ '<|observation|>\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- else -%}
{{ '<|' + m.role + '|>\n' + m.content + ('/nothink' if enable_thinking is false else '') }}
{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|assistant|>' + ('\n<think></think>' if enable_thinking is false else '') }}{%- endif -%}"""
MISTRAL = """{{ bos_token }}{%- if tools -%}
{{ '[AVAILABLE_TOOLS]' + tools|tojson + '[/AVAILABLE_TOOLS]' }}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- if m.tool_calls -%}{{ '[TOOL_CALLS]' + [m.tool_calls[0].function]|tojson + eos_token }}
{%- else -%}{{ ' ' + m.content + eos_token }}{%- endif -%}
{%- elif m.role == 'tool' -%}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
{%- else -%}{{ '[INST] ' + m.content + ' [/INST]' }}{%- endif -%}{%- endfor -%}"""

ON, OFF = {"enable_thinking": True}, {"enable_thinking": False}


@dataclass(frozen=True, slots=True)
class Style:
    """A template, its special tokens, and its target's answers."""

    template: str
    writes: str  # of {thought} and {said}, up to the end token
    end: str
    special: tuple[str, ...] = ()  # besides bos, eos and end
    eos: str = "<|endoftext|>"
    kwargs: dict[str, Any] = field(default_factory=dict)
    calls: str | None = None  # what calls the tool `look`, of {thought} and {arguments}
    call_end: str | None = None  # where a call does not end as an answer does

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a small BPE tokenizer, which has more than one way to write a text."""
        special = dict.fromkeys(
            ("<|bos|>", self.eos, self.end, *self.special, *filter(None, [self.call_end]))
        )
        texts = ["say the answer, think of the answer\n\n"] * 9
        return trained_bpe(texts, special, bos="<|bos|>", eos=self.eos, template=self.template)


IM = ("<|im_start|>",)
ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
GLM = (*ROLES, "[gMASK]", "<sop>")
DEEPSEEK = ("<|User|>", "<|Assistant|>", "<|call|>", "<|sep|>", "<|called|>", "<|output|>")
CHANNEL = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>")
THINKS = "<think>\n{thought}\n</think>\n\n"
THOUGHT = "<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant"
CALL = '<tool_call>\n{{"name": "look", "arguments": {arguments}}}\n</tool_call>'
R1_CALL = "<|call|>look<|sep|>{arguments}<|called|>"
GLM_CALL = "<tool_call>look\n<arg_key>at</arg_key>\n<arg_value>it</arg_value>\n</tool_call>"
V31 = DEEPSEEK_31.replace("OPENS", "('<think>' if enable_thinking else '</think>')")
STYLES = {
    "chatml": Style(CHATML, "{said}", "<|im_end|>", IM, eos="<|im_end|>"),
    "qwen3": Style(
        QWEN3_HYBRID, THINKS + "{said}", "<|im_end|>", IM, kwargs=ON, calls=THINKS + CALL
    ),
    "qwen3 no thoughts": Style(QWEN3_HYBRID, "{said}", "<|im_end|>", IM, kwargs=OFF, calls=CALL),
    "qwen3 thinking": Style(
        QWEN3_THINKING,
        "{thought}\n</think>\n\n{said}",
        "<|im_end|>",
        IM,
        eos="<|im_end|>",
        calls="{thought}\n</think>\n\n" + CALL,
    ),
    "r1": Style(
        R1.replace("OPENS", "'<think>\n'"),
        "{thought}\n</think>\n\n{said}",
        "<|eos|>",
        DEEPSEEK,
        eos="<|eos|>",
        calls="{thought}\n</think>\n\n" + R1_CALL,
    ),
    "deepseek 3.1": Style(
        V31,
        "{thought}</think>{said}",
        "<|eos|>",
        DEEPSEEK,
        eos="<|eos|>",
        kwargs=ON,
        calls="{thought}</think>" + R1_CALL,
    ),
    "deepseek 3.1 no thoughts": Style(
        V31, "{said}", "<|eos|>", DEEPSEEK, eos="<|eos|>", kwargs=OFF, calls=R1_CALL
    ),
    "harmony": Style(
        HARMONY,
        THOUGHT + "<|channel|>final<|message|>{said}",
        "<|return|>",
        CHANNEL,
        calls=THOUGHT
        + "<|channel|>commentary to=functions.look <|constrain|>json<|message|>{arguments}",
        call_end="<|call|>",
    ),
    "llama3": Style(
        LLAMA3,
        "{said}",
        "<|eot|>",
        ("<|head|>", "<|headed|>"),
        eos="<|eot|>",
        calls='{{"name": "look", "parameters": {arguments}}}',
    ),
    "gemma": Style(GEMMA, "{said}", "<end>", ("<turn>",)),
    "phi3": Style(PHI3, "{said}", "<|end|>", ROLES),
    "glm4": Style(GLM4, "\n{said}", "<|user|>", GLM),
    "glm45": Style(
        GLM45,
        "\n<think>{thought}</think>\n{said}",
        "<|user|>",
        GLM,
        kwargs=ON,
        calls="\n<think>{thought}</think>\n" + GLM_CALL,
        call_end="<|observation|>",
    ),
    "glm45 no thoughts": Style(
        GLM45,
        "\n{said}",
        "<|user|>",
        GLM,
        kwargs=OFF,
        calls="\n" + GLM_CALL,
        call_end="<|observation|>",
    ),
    "mistral": Style(
        MISTRAL,
        " {said}",
        "</s>",
        ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
        eos="</s>",
        calls='[TOOL_CALLS][{{"name": "look", "arguments": {arguments}}}]',
    ),
}
