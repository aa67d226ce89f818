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
QWEN3 = """{%- set last = namespace(user=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role != 'assistant' -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- else -%}
{%- set said, thought = m.content, m.reasoning_content or '' -%}
{%- if '</think>' in said -%}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
{%- set said = said.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{ '<|im_start|>assistant\n' }}
{%- if loop.index0 > last.user -%}{{ '<think>\n' + thought + '\n</think>\n\n' }}{%- endif -%}
{{ said + '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' + OPENS }}{%- endif -%}"""
QWEN3_HYBRID = QWEN3.replace(
    "OPENS", "('<think>\n\n</think>\n\n' if enable_thinking is false else '')"
)
QWEN3_THINKING = QWEN3.replace("OPENS", "'<think>\n'")
# the thoughts are opened by the prompt, and answers are written without any
R1 = """{{ bos_token }}{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}
{%- else -%}{{ ('<|User|>' if m.role == 'user' else '') + m.content }}{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|Assistant|>' + OPENS }}{%- endif -%}"""
DEEPSEEK_31 = R1.replace("'<|Assistant|>' + m.content", "'<|Assistant|></think>' + m.content")
HARMONY = """{{ '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- for m in messages -%}
{%- if m.role != 'assistant' -%}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
{%- else -%}
{%- if '<|channel|>' in m.content -%}{{ raise_exception('no channels in content') }}{%- endif -%}
{%- if loop.last and m.reasoning_content -%}
{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}
{%- endif -%}
{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}"""
LLAMA3 = """{{ bos_token + '<|head|>system<|headed|>\n\nToday: ' }}
{{- strftime_now('%d %b %Y') + '<|eot|>' }}
{%- for m in messages -%}{{ '<|head|>' + m.role + '<|headed|>\n\n' + m.content|trim + '<|eot|>' }}
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
GLM45 = """[gMASK]<sop>{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|assistant|>\n<think></think>\n' + m.content.split('</think>')[-1].strip() }}
{%- else -%}
{{ '<|' + m.role + '|>\n' + m.content + ('/nothink' if enable_thinking is false else '') }}
{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|assistant|>' + ('\n<think></think>' if enable_thinking is false else '') }}{%- endif -%}"""
MISTRAL = """{{ bos_token }}{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{{ ' ' + m.content + eos_token }}
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

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a small BPE tokenizer, which has more than one way to write a text."""
        special = dict.fromkeys(("<|bos|>", self.eos, self.end, *self.special))
        texts = ["say the answer, think of the answer\n\n"] * 9
        return trained_bpe(texts, special, bos="<|bos|>", eos=self.eos, template=self.template)


IM = ("<|im_start|>",)
ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
THINKS = "<think>\n{thought}\n</think>\n\n{said}"
CHANNELS = (
    "<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant"
    "<|channel|>final<|message|>{said}"
)
STYLES = {
    "chatml": Style(CHATML, "{said}", "<|im_end|>", IM, eos="<|im_end|>"),
    "qwen3": Style(QWEN3_HYBRID, THINKS, "<|im_end|>", IM, kwargs=ON),
    "qwen3 no thoughts": Style(QWEN3_HYBRID, "{said}", "<|im_end|>", IM, kwargs=OFF),
    "qwen3 thinking": Style(
        QWEN3_THINKING, "{thought}\n</think>\n\n{said}", "<|im_end|>", IM, eos="<|im_end|>"
    ),
    "r1": Style(
        R1.replace("OPENS", "'<think>\n'"),
        "{thought}\n</think>\n\n{said}",
        "<|eos|>",
        ("<|User|>", "<|Assistant|>"),
        eos="<|eos|>",
    ),
    "deepseek 3.1": Style(
        DEEPSEEK_31.replace("OPENS", "('<think>' if enable_thinking else '</think>')"),
        "{thought}</think>{said}",
        "<|eos|>",
        ("<|User|>", "<|Assistant|>"),
        eos="<|eos|>",
        kwargs=ON,
    ),
    "deepseek 3.1 no thoughts": Style(
        DEEPSEEK_31.replace("OPENS", "('<think>' if enable_thinking else '</think>')"),
        "{said}",
        "<|eos|>",
        ("<|User|>", "<|Assistant|>"),
        eos="<|eos|>",
        kwargs=OFF,
    ),
    "harmony": Style(
        HARMONY,
        CHANNELS,
        "<|return|>",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"),
    ),
    "llama3": Style(LLAMA3, "{said}", "<|eot|>", ("<|head|>", "<|headed|>"), eos="<|eot|>"),
    "gemma": Style(GEMMA, "{said}", "<end>", ("<turn>",)),
    "phi3": Style(PHI3, "{said}", "<|end|>", ROLES),
    "glm4": Style(GLM4, "\n{said}", "<|user|>", (*ROLES, "[gMASK]", "<sop>")),
    "glm45": Style(
        GLM45,
        "\n<think>{thought}</think>\n{said}",
        "<|user|>",
        (*ROLES, "[gMASK]", "<sop>"),
        kwargs=ON,
    ),
    "glm45 no thoughts": Style(
        GLM45, "\n{said}", "<|user|>", (*ROLES, "[gMASK]", "<sop>"), kwargs=OFF
    ),
    "mistral": Style(MISTRAL, " {said}", "</s>", eos="</s>"),
}
