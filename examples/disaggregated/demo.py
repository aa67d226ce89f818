"""A server and a trainer in processes of their own: either may be killed, and nothing is lost.

    make demo-disaggregated
    SPECFORGE_SGLANG_PYTHON=VENV/bin/python python examples/disaggregated/demo.py

Starts SGLang on a tiny random model, and trains a DFlash draft from it with two ranks: once
undisturbed; then with the trainer killed (-9) and started again, and the server killed (-9)
and started again.  Both runs must have taken the same steps on the same tokens.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import specforge_sglang_capture
import yaml
from specforge_sglang.child import free_port

from specforge_core.testing.toy import save_toy_target, write_conversations

OUTPUT = Path("outputs/disaggregated")
STEPS = 60
KILL_TRAINER, KILL_SERVER = 15, 35  # after these steps
SGLANG_CPU = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--max-total-tokens", "4096", "--mem-fraction-static", "0.5"),
)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def family(pid: int) -> list[int]:
    """Return a process and everything it started."""
    children: list[str] = []
    with suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(member for child in children for member in family(int(child)))]


class Server:
    """SGLang with specforge's plugin, on a port that stays the same when it is started again."""

    def __init__(self, python: str, target: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [python, "-m", "specforge_sglang_capture", "--model-path", str(target)]
        self.command += ["--port", str(self.port), "--dtype", "float32", "--skip-tokenizer-init"]
        self.command += ["--log-level", "warning", *SGLANG_CPU]
        # a user would run `pip install --no-deps specforge-sglang` in SGLang's environment
        source = Path(specforge_sglang_capture.__file__).parent.parent
        self.site = OUTPUT.resolve() / "site"
        self.site.mkdir()
        (self.site / "specforge_sglang_capture").symlink_to(source / "specforge_sglang_capture")
        info = self.site / "specforge_sglang_capture-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: specforge-sglang-capture\nVersion: 0\n"
        )
        (info / "entry_points.txt").write_text(
            "[sglang.srt.plugins]\nspecforge_capture = specforge_sglang_capture:register\n"
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        env = os.environ | {"PYTHONPATH": str(self.site), "SGLANG_USE_CPU_ENGINE": "1"}
        with (OUTPUT / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=env, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        assert self.process is not None
        while self.process.poll() is None:
            with suppress(OSError):
                urllib.request.urlopen(f"{self.url}/server_info", timeout=5).close()
                return
            time.sleep(0.2)
        sys.exit(f"SGLang ended; see {OUTPUT}/server.log")

    def kill(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Trainer:
    """`specforge train` with two ranks."""

    def __init__(self, config: Path, output: Path) -> None:
        self.output = output
        self.process: Any = None
        self.command = [sys.executable, "-m", "specforge_core.cli", "train", "-c", str(config)]
        self.command += ["--nproc", "2", f"output_dir={output}"]

    def start(self) -> None:
        self.process = subprocess.Popen(self.command)

    def rows(self) -> list[dict[str, Any]]:
        """Return the logged steps; a line that is being written is left out."""
        path = self.output / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait_for(self, step: int) -> None:
        while not (rows := self.rows()) or rows[-1]["step"] < step:
            if self.process.poll() is not None:
                sys.exit("the trainer ended too early")
            time.sleep(0.02)

    def kill(self) -> None:
        """Kill the launcher and both ranks, which are in sessions of their own."""
        if self.process is not None and self.process.poll() is None:
            for pid in family(self.process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()

    def finish(self) -> list[dict[str, Any]]:
        if self.process.wait():
            sys.exit("the trainer failed")
        return self.rows()


def write_config(target: Path, url: str) -> Path:
    data = write_conversations(OUTPUT / "train.jsonl", 64)
    raw: dict[str, Any] = {
        "target": {
            "path": str(target),
            "engine": "sglang",
            "options": {"url": url, "max_requests": 8, "patience": 900},
        },
        "strategy": {"name": "dflash", "block_size": 4, "num_layers": 1, "num_anchors": 64},
        "data": {"train": [str(data)]},
        "capture": {"window": 4},
        "train": {
            "max_steps": STEPS,
            "batch_size": 2,
            "learning_rate": 0.003,
            "save_every": 5,
            "log_every": 1,
            "device": "cpu",
        },
    }
    path = OUTPUT / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def compare(calm: list[dict[str, Any]], disturbed: list[dict[str, Any]]) -> None:
    """Exit with an error unless both runs took the same steps on the same samples."""
    for rows in (calm, disturbed):
        if [row["step"] for row in rows] != list(range(1, STEPS + 1)):
            sys.exit("a step was lost or taken twice")
    if [row["tokens"] for row in calm] != [row["tokens"] for row in disturbed]:
        sys.exit("the runs trained on different samples")
    gaps = [abs(a["loss"] - b["loss"]) for a, b in zip(calm, disturbed, strict=True)]
    print(f"{STEPS} steps, {int(calm[-1]['tokens'])} tokens in both runs")
    print(
        f"loss {calm[0]['loss']:.4f} -> {calm[-1]['loss']:.4f}, largest difference {max(gaps):.1e}"
    )
    # the server batches what comes together, so states differ by their rounding
    if max(gaps) > 1e-2:
        sys.exit("the losses differ")


def main() -> None:
    python = os.environ.get("SPECFORGE_SGLANG_PYTHON")
    if python is None:
        sys.exit(
            "SPECFORGE_SGLANG_PYTHON must name the interpreter of an environment with SGLang. Try: "
            "plugins/specforge-sglang/tests/install_cpu.sh ~/sglang 0.5.14, then "
            "SPECFORGE_SGLANG_PYTHON=~/sglang/bin/python make demo-disaggregated"
        )
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    target = OUTPUT.resolve() / "target"
    save_toy_target(target)
    server = Server(python, target)
    trainer = Trainer(write_config(target, server.url), OUTPUT / "calm")
    try:
        say(f"SGLang starts on {server.url}")
        server.start()
        server.wait()
        say(f"{STEPS} steps, two ranks, undisturbed")
        trainer.start()
        calm = trainer.finish()
        trainer = Trainer(OUTPUT / "run.yaml", OUTPUT / "disturbed")
        trainer.start()
        trainer.wait_for(KILL_TRAINER)
        trainer.kill()
        say(f"both ranks killed at step {trainer.rows()[-1]['step']}; the same command again")
        trainer.start()
        trainer.wait_for(KILL_SERVER)
        server.kill()
        say(f"the server killed at step {trainer.rows()[-1]['step']}; it starts again")
        server.start()
        disturbed = trainer.finish()
        say("both runs")
        compare(calm, disturbed)
    finally:
        trainer.kill()  # nothing is left, unless something went wrong
        server.kill()


if __name__ == "__main__":
    main()
