"""DFlash and EAGLE-3 drafts of SmolLM2-135M on the same data, on one GPU: train and compare.

    python examples/recipes/smollm2_gpu/run.py OUT --prompts DIR [PART ...] [KEY=VALUE ...]

Parts, in order, all of them unless some are named; one that is done is left out next time:

    answers   the target answers the prompts greedily and, meanwhile, at temperature 1: served by
              SGLang, or without it in processes of transformers, which takes longer
    dflash    training                            eagle3    training, on the same answers
    eval      acceptance on held-out prompts, each draft at temperature 0 and 1, side by side
    speed     tokens a second with and without the draft, alone on the machine, fewer prompts
    export    both drafts as SGLang loads them
    report    tables and curves, from what there is

SGLANG_PYTHON names the interpreter of an environment with SGLang, or a script that calls it, if
there is one; SGLANG_ARGS are more flags for the server.  KEY=VALUE goes to every specforge command:
`train.max_steps=300`.  OUT/parts.json keeps times; take a part's line out to do it again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from specforge_sglang.child import free_port

HERE = Path(__file__).parent
TARGET = Path("~/.cache/specforge/smollm2-135m-instruct").expanduser()
DRAFTS = ("dflash", "eagle3")
PARTS = ("answers", *DRAFTS, "eval", "speed", "export", "report")
ANSWERS = ("answers-t0.jsonl", "answers-t1.jsonl")
SPECFORGE = (sys.executable, "-m", "specforge_core.cli")
START_SECONDS = 300
GPU_FLAGS = "--attention-backend triton --sampling-backend pytorch --grammar-backend none"
CPU_FLAGS = (
    "--device cpu --attention-backend torch_native --sampling-backend pytorch "
    "--grammar-backend none --mem-fraction-static 0.5 --max-total-tokens 8192"
)


class Recipe:
    """The commands, with the paths and overrides of one call."""

    def __init__(self, arguments: argparse.Namespace, overrides: list[str]) -> None:
        self.out: Path = arguments.out
        self.prompts: Path = arguments.prompts
        self.limit: int | None = arguments.limit
        self.target: Path = arguments.target.expanduser().resolve()
        self.overrides = overrides
        self.out.mkdir(parents=True, exist_ok=True)
        self.env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    def command(self, verb: str, draft: str, *arguments: str) -> list[str]:
        config = ["-c", str(HERE / f"run_{draft}.yaml")]
        return [*SPECFORGE, verb, *config, *arguments, f"target.path={self.target}"]

    def call(self, *commands: list[str]) -> str:
        """Run commands side by side; return what they printed, or exit if one failed."""
        running = []
        for command in commands:
            print(f"$ specforge {shlex.join(command[3:])}", flush=True)
            running.append(
                subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, text=True)
            )
        try:
            printed = [process.communicate()[0] for process in running]
        finally:  # of an interrupted call
            for process in running:
                process.terminate()
                process.wait()
        print("".join(printed), end="", flush=True)
        if failed := [process.returncode for process in running if process.returncode]:
            sys.exit(failed[0])
        return "".join(printed)

    def answers(self) -> str:
        files = [self.prompts / "samples.jsonl", self.prompts / "prompts.jsonl"]
        limit = [f"data.limit={self.limit}"] if self.limit else []
        commands = []
        with answering(self.target, self.out / "server.log") as engine:
            for output, temperature in zip(ANSWERS, (0, 1), strict=True):
                chosen = ",".join(map(str, files[1 - temperature :]))  # greedy ones would repeat
                options = [f"regenerate.prompts=[{chosen}]", *engine, *limit]
                options += [f"regenerate.temperature={temperature}", *self.overrides]
                path = str(self.out / output)
                commands.append(self.command("regenerate", "dflash", "-o", path, *options))
            return self.call(*commands)

    def train(self, draft: str) -> str:
        data = ",".join(str(self.out / name) for name in ANSWERS)
        few = ["eval.limit=4", "eval.max_new_tokens=64"]  # decoded while training waits
        options = [f"data.train=[{data}]", f"output_dir={self.out / draft}", *few, *self.overrides]
        return self.call(self.command("train", draft, *options))

    def _eval(self, draft: str, name: str, *options: str) -> list[str]:
        where = ("--draft", f"{self.out / draft}@best", f"output_dir={self.out / name}")
        return self.command("eval", draft, *where, *options, *self.overrides)

    def eval(self) -> str:
        """Acceptance does not depend on what else runs, so all four run at once."""
        commands = []
        for draft in DRAFTS:
            commands.append(self._eval(draft, f"{draft}-t0", "eval.temperature=0"))
            options = ("eval.temperature=1", "eval.compare=false")
            commands.append(self._eval(draft, f"{draft}-t1", *options))
        return self.call(*commands)

    def speed(self) -> str:
        options = ("eval.temperature=0", "eval.limit=4")
        return "".join(self.call(self._eval(d, f"{d}-speed", *options)) for d in DRAFTS)

    def export(self) -> str:
        said = ""
        for draft in DRAFTS:
            where = [
                "--checkpoint",
                f"{self.out / draft}@best",
                "-o",
                str(self.out / f"{draft}-sglang"),
            ]
            said += self.call([*SPECFORGE, "export", *where, "--format", "sglang", "--force"])
        return said

    def report(self) -> str:
        done = subprocess.run([sys.executable, str(HERE / "report.py"), str(self.out)], check=False)
        if done.returncode:
            sys.exit(done.returncode)
        return ""

    def part(self, name: str) -> None:
        """Do one part unless it is done, and note how long it took."""
        notes = self.out / "parts.json"
        parts = json.loads(notes.read_text()) if notes.exists() else {}
        if name in parts and name != "report":
            print(f"== {name}: done before ({parts[name]['seconds']:.0f} s)", flush=True)
            return
        print(f"\n== {name}", flush=True)
        start = time.monotonic()
        said = self.train(name) if name in DRAFTS else getattr(self, name)()
        seconds = time.monotonic() - start
        parts = json.loads(notes.read_text()) if notes.exists() else {}  # another call's part
        parts[name] = {"seconds": round(seconds, 1), "said": said.splitlines()}
        beside = notes.with_suffix(".tmp")
        beside.write_text(json.dumps(parts, indent=1) + "\n")
        beside.replace(notes)
        print(f"== {name}: {seconds:.0f} s", flush=True)


@contextmanager
def answering(target: Path, log: Path) -> Iterator[list[str]]:
    """Yield the options by which a server answers while the block runs; none without SGLang."""
    python = os.environ.get("SGLANG_PYTHON")
    if python is None:
        yield []
        return
    with serving(python, target, log) as url:
        yield ["target.engine=openai", f"target.options={{urls: [{url}]}}"]


@contextmanager
def serving(python: str, target: Path, log: Path) -> Iterator[str]:
    """Serve the target with SGLang while the block runs; a GPU's first try uses CUDA graphs."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    gpu = torch.cuda.is_available()
    env |= {"HF_HUB_OFFLINE": "1"} | ({} if gpu else {"SGLANG_USE_CPU_ENGINE": "1"})
    port = free_port()
    flags = f"--model-path {shlex.quote(str(target))} --port {port} --dtype bfloat16"
    flags += f" --log-level warning {GPU_FLAGS if gpu else CPU_FLAGS}"
    flags += " " + os.environ.get("SGLANG_ARGS", "")
    process: subprocess.Popen[bytes] | None = None
    try:
        for more in ("", "--disable-cuda-graph") if gpu else ("",):
            command = [python, "-m", "sglang.launch_server", *shlex.split(f"{flags} {more}")]
            print(f"$ {shlex.join(command)}", flush=True)
            with log.open("ab") as file:
                process = subprocess.Popen(
                    command, env=env, stdout=file, stderr=file, start_new_session=True
                )
            if ready(process, port):
                break
            end(process)
        else:
            sys.exit(f"SGLang did not start:\n{log.read_text(errors='replace')[-2000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        if process is not None:
            end(process)


def ready(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until a server answers; false when it ended or took too long."""
    give_up = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < give_up:
        with suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return True
        time.sleep(0.5)
    return False


def end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="DFlash and EAGLE-3 of SmolLM2-135M, compared.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=Path, default=Path("~/.cache/specforge/gpu"))
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--limit", type=int, help="answer only the first prompts")
    parser.add_argument("rest", nargs="*", metavar="PART or KEY=VALUE")
    arguments = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and no server stays behind
    arguments.prompts = arguments.prompts.expanduser()
    parts = [word for word in arguments.rest if "=" not in word]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: no such part; parts are {', '.join(PARTS)}")
    recipe = Recipe(arguments, [word for word in arguments.rest if "=" in word])
    for name in PARTS:
        if name in parts or not parts:
            recipe.part(name)


if __name__ == "__main__":
    main()
