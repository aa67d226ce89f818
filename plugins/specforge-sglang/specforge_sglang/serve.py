"""An exported draft, served by stock SGLang: `specforge doctor`'s judge.

How SGLang counts.  `spec_verify_ct` is the verifications.  `spec_num_correct_drafts` is the
drafted tokens they accepted, without the target's own one of each, and including what the
last verification accepted behind an end-of-text token or past `max_new_tokens`.
`completion_tokens` begins with the prompt's own token and ends where the answer does.
SGLang's `spec_accept_length` is completion_tokens / spec_verify_ct: it counts the prompt's
token, and cuts the last verification.  This package counts what verifications yielded (see
`specforge_core.evaluate.decode.DecodeStats`), which is
    completion_tokens - 1                       where an end-of-text token ended the answer,
    spec_num_correct_drafts + spec_verify_ct    where `max_new_tokens` did.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from specforge_openai.http_json import Refused, ServerDown

from specforge_core.config import TargetConfig
from specforge_core.drafts.export import read_provenance, read_serve
from specforge_core.errors import CaptureError, CheckpointError, RunError
from specforge_core.progress import console
from specforge_core.target.info import load_target_info
from specforge_core.text import cut, harmless
from specforge_core.types import DraftServer, NotServed, ServedAnswer

from .child import PLAIN, ChildServer, server_flags, uses_cpu
from .client import understood
from .options import Flag, SGLangOptions, read_options

STEPS, TOKENS = "speculative_num_steps", "speculative_num_draft_tokens"  # the last verified too
AT_ONCE = 16  # answers at a time: more would change nothing but the roundings of batches
# What is sure to run, since only acceptance is measured; target.options.server_args win.
FLAGS: dict[str, Flag] = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "disable_radix_cache": True,
    "chunked_prefill_size": -1,
    "skip_server_warmup": True,
    "mem_fraction_static": 0.5,  # this process holds a part of the GPU too
}
# in the last words of a version that came out before the draft's method, or the target
UNKNOWN = (
    r"unrecognized arguments: (--speculative\S*)",
    r"Unknown speculative algorithm name: (\S+)",
    r"'(\w+)' is not a registered model",
    r"Model architectures \['(\w+)'\] are not supported",
)
ACCEPTED = ("spec_num_correct_drafts", "spec_accepted_drafts")  # the new name, the old one


def serve(target: TargetConfig, export: Path, draft_tokens: int) -> DraftServer | NotServed:
    """Start a server with the export as its draft; NotServed where SGLang cannot."""
    options = read_options(target)
    if options.python is None:
        return NotServed(
            reason="the servers at target.options.urls run without this draft. "
            "Try: target.options.python=/path/to/sglang-venv/bin/python, and no urls"
        )
    drafting = drafting_flags(export, draft_tokens)
    if isinstance(drafting, NotServed):
        return drafting
    if uses_cpu(target):
        return NotServed(
            reason="SGLang drafts on a GPU only. Try: the same command on a machine with one, "
            "target.device=auto"
        )
    drafting["speculative_draft_model_path"] = str(export.resolve())
    tell_unset(export, {**os.environ, **options.env})
    try:
        return SGLangServer(target, options, drafting)
    except CaptureError as exc:
        found = filter(None, (re.search(pattern, str(exc)) for pattern in UNKNOWN))
        if (unknown := next(found, None)) is None:
            raise
        return NotServed(
            reason=f"the SGLang of {options.python} does not know {unknown[1]}, and cannot serve "
            "this draft of this target. Try: target.options.python of a newer SGLang"
        )


def drafting_flags(export: Path, draft_tokens: int) -> dict[str, Flag] | NotServed:
    """Return the flags that an export's provenance.json gives for SGLang.

    A chain, which has one token a step, is made `draft_tokens` long; a tree, and a block that is
    drafted at once, are as the export says, which is what users are served.
    """
    given = read_serve(export, "sglang")
    if given is None:
        return NotServed(
            reason="the export does not say how SGLang serves it (serve.sglang in its "
            "provenance.json). Try: specforge export --format sglang"
        )
    flags: dict[str, Flag] = {}
    for name, value in given.items():
        plain = name.lstrip("-").replace("-", "_")
        if not plain.startswith("speculative_") or not isinstance(value, bool | int | float | str):
            raise CheckpointError(
                f"{export}/provenance.json: serve.sglang.{name}={value!r} is no flag of drafting "
                "(speculative_...). Export again"
            )
        flags[plain] = value
    if STEPS in flags and flags.get(TOKENS) == int(flags[STEPS]) + 1:
        flags |= {STEPS: draft_tokens, TOKENS: draft_tokens + 1}
    return flags


def tell_unset(export: Path, env: Mapping[str, str]) -> None:
    """Say which variables an export asks for that are not so in `env`.

    They are not taken from it: an export may be anybody's, and some variables make SGLang run code.
    """
    asked = read_provenance(export).get("environment")
    wanted = asked.get("sglang") if isinstance(asked, dict) else None
    for name, value in wanted.items() if isinstance(wanted, dict) else ():
        if env.get(name) != value:
            given = harmless(cut(f"{name}={value}"))
            console.print(
                f"note: SGLang runs without {given}, which {export} asks for and nobody sets. "
                f"Try: target.options.env.{given}"
            )


class SGLangServer:
    """A child process that serves the target with a draft.  Ends with `close` or this process."""

    def __init__(
        self, target: TargetConfig, options: SGLangOptions, drafting: Mapping[str, Flag]
    ) -> None:
        plain = options.model_copy(update={"server_args": {}})
        info = load_target_info(target)
        flags = {**server_flags(target, info, plain), **FLAGS, **drafting, **options.server_args}
        self._child = ChildServer(target, info, options, flags, PLAIN)
        self._client = self._child.client(options.timeout)
        self._at_once = min(AT_ONCE, options.max_requests)
        try:
            self._child.wait(self._child.client(5.0), options.start_timeout)
            version = self._client.get("/server_info").get("version", "of unknown version")
        except BaseException:
            self._child.close()
            raise
        self._name = f"SGLang {version}"

    @property
    def name(self) -> str:
        return self._name

    def answer(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos: frozenset[int], /
    ) -> list[ServedAnswer]:
        """Answer greedily.  Raises RunError when SGLang fails, or does not say what it drafted."""
        sampling = {
            "temperature": 0.0,
            "max_new_tokens": max_new_tokens,
            "stop_token_ids": sorted(eos),
            "no_stop_trim": True,
        }
        with ThreadPoolExecutor(self._at_once) as threads:
            return list(threads.map(partial(self._answer, sampling=sampling), prompts))

    def _answer(self, prompt: Sequence[int], sampling: Mapping[str, Any]) -> ServedAnswer:
        try:
            found = self._client.generate(prompt, sampling)
        except (Refused, ServerDown) as exc:
            self._child.check_alive()
            reason = str(exc).rstrip(".")
            raise RunError(
                f"{self._name} did not answer a prompt of {len(prompt)} tokens: {reason}. Its last "
                f"lines:\n{self._child.last_words()}\nTry: target.options.server_args"
            ) from exc
        return counted(found, self._name)

    def close(self) -> None:
        """End the server and everything it started."""
        self._child.close()


def counted(found: Mapping[str, Any], engine: str) -> ServedAnswer:
    """Return an answer of /generate in this package's counts; see the module's docstring."""
    with understood(found, engine):
        return _counted(found, engine)


def _counted(found: Mapping[str, Any], engine: str) -> ServedAnswer:
    tokens = tuple(found.get("output_ids") or ())
    meta: Mapping[str, Any] = found.get("meta_info") or {}
    verifications = int(meta.get("spec_verify_ct") or 0)
    total = int(meta.get("completion_tokens") or len(tokens))
    if total < 2:  # the prompt's own run is all that was needed
        return ServedAnswer(tokens=tokens, verifications=0, emitted=0)
    accepted = next((int(meta[name]) for name in ACCEPTED if meta.get(name) is not None), None)
    if not verifications or accepted is None:
        raise RunError(
            f"{engine} does not say how much it drafted: its answer's meta_info has "
            f"{', '.join(sorted(k for k in meta if k.startswith('spec'))) or 'nothing of it'}. "
            "Try: SGLang 0.5.14 or newer, and no speculative flags in target.options.server_args"
        )
    reason = (meta.get("finish_reason") or {}).get("type")
    emitted = total - 1 if reason == "stop" else accepted + verifications
    return ServedAnswer(tokens=tokens, verifications=verifications, emitted=emitted)
