"""All installed methods on one capture of one target: train, measure, serve, compare.

    python examples/recipes/compare/compare.py OUT [STAGE ...] [KEY=VALUE ...]

Stages, in order, all of them unless some are named; what is done is left out next time:

    answers   the target answers the quickstart's questions, or the prompts of a folder that
              examples/recipes/smollm2_gpu/make_prompts.py wrote, as run.py there does
    capture   the target's states of all answers, once: what the method that asks for most asks for
    train     every method from that capture, for as many tokens
    eval      acceptance on held-out prompts, each draft at temperature 0 and 1
    speed     where several of these ran at once: training and decoding again, shortly, each alone
              on its GPU
    serve     the drafts that SGLang serves, in SGLang, if SPECFORGE_SGLANG_PYTHON names its
              interpreter
    table     table.md, table.json and compare.png, from what there is

Run from the root of the checkout.  KEY=VALUE goes to every specforge command.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "smollm2_gpu")]
# a look at how many GPUs there are must leave this process fit to be forked
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from inputs import chosen, write_config, write_prompts  # noqa: E402
from jobs import Job, run_jobs  # noqa: E402
from results import write_results  # noqa: E402
from run import ANSWERS, TARGET, Recipe  # noqa: E402
from served import serve  # noqa: E402

from specforge_core.capture.identity import covers  # noqa: E402
from specforge_core.capture.manifest import MANIFEST, CaptureManifest  # noqa: E402
from specforge_core.config import TargetConfig  # noqa: E402
from specforge_core.errors import SpecForgeError  # noqa: E402
from specforge_core.load import load_config, read_yaml  # noqa: E402
from specforge_core.target.info import load_target_info  # noqa: E402
from specforge_core.types import CaptureSpec, TargetInfo  # noqa: E402

STAGES = ("answers", "capture", "train", "eval", "speed", "serve", "table")
TEMPERATURES = (0, 1)
PACE_STEPS = 40  # of a training alone, of which the first quarter warms up


def preload(info: TargetInfo) -> None:
    """Import and make once what every fork needs."""
    import matplotlib.figure  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import specforge_core.capture.job
    import specforge_core.cli
    import specforge_core.evaluate.run
    import specforge_core.train.run  # noqa: F401
    from specforge_core.target.skeleton import stored_as

    stored_as("", (), info)  # transformers makes its table of renamed weights: half a second


class Answers(Recipe):
    """The other recipe's first part, its commands run in forks."""

    compare: Compare

    def call(self, *commands: list[str]) -> str:
        """Run commands side by side, each once."""
        jobs = [
            self.compare.job("answers", Path(command[command.index("-o") + 1]).stem, *command[3:])
            for command in commands
        ]
        self.compare.run(jobs, len(jobs))
        return ""


@dataclass
class Compare:
    """The options of one call, and the stages."""

    arguments: argparse.Namespace
    overrides: tuple[str, ...]
    failed: list[str]

    def __post_init__(self) -> None:
        self.out: Path = self.arguments.out
        self.target: Path = self.arguments.target.expanduser().resolve()
        self.gpus = [gpu for gpu in (self.arguments.gpus or "").split(",") if gpu]
        self.methods = self._configs()
        self._info = load_target_info(TargetConfig(path=str(self.target)))
        specs = {method: self._spec(method) for method in self.methods}
        self.widest = max(specs, key=lambda method: len(specs[method].fields))
        for method, spec in specs.items():
            if not covers(specs[self.widest], spec):
                print(f"   {method} is left out: it asks for other states than {self.widest}")
                self.methods.remove(method)
        preload(self._info)

    def _configs(self) -> list[str]:
        """Write a config for each method, OUT/configs/METHOD.yaml; return the methods."""
        own = read_yaml(self.arguments.methods_file)
        methods = chosen(self.arguments.methods, own)
        answers = [str(self.out / name) for name in ANSWERS]
        paths: dict[str, dict[str, Any]] = {
            "target": {"path": str(self.target)},
            "data": {"train": answers, "capture_dir": str(self.out / "capture")},
        }
        for method in methods:
            write_config(self.config(method), method, self.arguments.config, own, paths)
        return methods

    def config(self, method: str) -> Path:
        return self.out / "configs" / f"{method}.yaml"

    def job(self, stage: str, name: str, *arguments: str, **more: Any) -> Job:
        """Return a job with its places under OUT."""
        log, done = self.out / "logs" / f"{stage}-{name}.log", self.out / "done" / stage / name
        return Job(f"{stage} {name}", arguments, log, done.with_suffix(".json"), **more)

    def command(self, stage: str, name: str, verb: str, method: str, *arguments: str) -> Job:
        config = ("-c", str(self.config(method)))
        return self.job(
            stage, name, verb, *config, *arguments, *self.overrides, made_of=self._made_of(method)
        )

    def _made_of(self, method: str) -> str:
        """Return a digest of a method's config and of the answers."""
        files = [self.config(method), *(self.out / name for name in ANSWERS)]
        digest = hashlib.sha256()
        for path in files:
            digest.update(path.read_bytes() if path.exists() else b"-")
        return digest.hexdigest()

    def run(self, jobs: list[Job], at_once: int) -> None:
        self.failed += run_jobs(jobs, at_once, self.gpus)

    def has(self, method: str) -> bool:
        """Say whether a method's training is done."""
        return (self.out / "done" / "train" / f"{method}.json").exists()

    # ---- stages ----

    def answers(self) -> None:
        if python := os.environ.get("SPECFORGE_SGLANG_PYTHON"):
            os.environ["SGLANG_PYTHON"] = python
        prompts: Path | None = self.arguments.prompts
        self.arguments.prompts = (
            prompts.expanduser() if prompts else write_prompts(self.out / "prompts")
        )
        recipe = Answers(self.arguments, list(self.overrides))
        recipe.compare = self
        recipe.answers()

    def capture(self) -> None:
        place, by = self.out / "capture", self.widest
        if (place / MANIFEST).exists():  # by the method that captured, if fewer are asked for now
            by = CaptureManifest.read(place).identity.strategy
        self.run([self.command("capture", "all", "capture", by, "--yes")], 1)

    def _spec(self, method: str) -> CaptureSpec:
        run, strategy = load_config(self.config(method), self.overrides)
        return strategy.adapter(run.strategy, self._info).spec

    def train(self) -> None:
        minutes = self.arguments.minutes
        limits = [] if minutes is None else [f"train.max_minutes={minutes}"]
        jobs = [self._train("train", m, self._steps(m), *limits) for m in self.methods]
        self.run(jobs, self.arguments.jobs)

    def _train(self, stage: str, method: str, steps: int, *more: str) -> Job:
        where = f"output_dir={self.out / stage / method}"
        return self.command(
            stage, method, "train", method, where, f"train.max_steps={steps}", *more
        )

    def _steps(self, method: str) -> int:
        """Return the steps that come to `--tokens`: of the same samples for every method."""
        manifest = CaptureManifest.read(self.out / "capture")
        train = load_config(self.config(method), self.overrides)[0].train
        a_step = manifest.num_tokens / manifest.num_samples * train.batch_size * train.accumulate
        return max(1, round(self.arguments.tokens / a_step))

    def eval(self) -> None:
        at_once = self.arguments.eval_jobs or self.arguments.jobs
        self.run(
            [
                self._eval("eval", f"{method}-t{temperature}", method, temperature, at_once == 1)
                for method in self.methods
                for temperature in TEMPERATURES
                if self.has(method)
            ],
            at_once,
        )

    def _eval(
        self, stage: str, name: str, method: str, temperature: int, compare: bool, *more: str
    ) -> Job:
        where = ("--draft", str(self.out / "train" / method), "--json")
        options = [f"output_dir={self.out / stage / name}", f"eval.temperature={temperature}"]
        options.append(f"eval.compare={'true' if compare and not temperature else 'false'}")
        return self.command(stage, name, "eval", method, *where, *options, *more)

    @property
    def _alone(self) -> int:
        """How many jobs run at once where each has a GPU to itself."""
        return max(1, len(self.gpus))

    def speed(self) -> None:
        """Measure alone what was measured beside others; as far as it was not."""
        at_once = self.arguments.eval_jobs or self.arguments.jobs
        trained = [method for method in self.methods if self.has(method)]
        if at_once > 1:
            few = (f"eval.limit={self.arguments.speed_limit}",)
            jobs = [self._eval("speed", m, m, 0, True, *few) for m in trained]
            self.run(jobs, self._alone)
        if self.arguments.jobs > 1:
            jobs = []
            for method in trained:
                steps = min(PACE_STEPS, self._steps(method))
                often = f"train.log_every={max(1, steps // 4)}"
                jobs.append(self._train("pace", method, steps, often))
            self.run(jobs, self._alone)

    def serve(self) -> None:
        python = os.environ.get("SPECFORGE_SGLANG_PYTHON")
        if python is None:
            print("   not served: SPECFORGE_SGLANG_PYTHON names no interpreter with SGLang")
            return
        jobs = []
        for method in filter(self.has, self.methods):
            places = (str(self.config(method)), str(self.out / "train" / method))
            result = str(self.out / "served" / f"{method}.json")
            jobs.append(
                self.job(
                    "serve",
                    method,
                    *places,
                    result,
                    python,
                    *self.overrides,
                    work=serve,
                    made_of=self._made_of(method),
                )
            )
        self.run(jobs, self._alone)

    def table(self) -> None:
        write_results(self.out)


def main() -> None:
    parser = argparse.ArgumentParser(description="All methods on one capture, compared.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=Path, help="a folder of make_prompts.py; else its own")
    parser.add_argument("--limit", type=int, default=4000, help="prompts at each temperature")
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--methods", help="instead of all that are installed: a,b,c")
    parser.add_argument("--tokens", type=int, default=3_000_000, help="to train each method on")
    parser.add_argument("--minutes", type=float, help="and no longer than this")
    parser.add_argument("--jobs", type=int, default=1, help="methods trained at once")
    parser.add_argument("--eval-jobs", type=int, help="evaluations at once; as --jobs if not given")
    parser.add_argument("--speed-limit", type=int, default=2, help="prompts of a set, alone")
    parser.add_argument("--gpus", help="to use, in turn: 0,1")
    parser.add_argument("--config", type=Path, default=HERE / "run.yaml")
    parser.add_argument("--methods-file", type=Path, default=HERE / "methods.yaml")
    parser.add_argument("rest", nargs="*", metavar="STAGE or KEY=VALUE")
    arguments = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    stages = [word for word in arguments.rest if "=" not in word]
    if unknown := set(stages) - set(STAGES):
        parser.error(f"{', '.join(sorted(unknown))}: no such stage; they are {', '.join(STAGES)}")
    overrides = tuple(word for word in arguments.rest if "=" in word)
    try:
        compare = Compare(arguments, overrides, [])
        for stage in STAGES:
            if stage in stages or not stages:
                print(f"== {stage}", flush=True)
                began = time.monotonic()
                getattr(compare, stage)()
                print(f"== {stage}: {time.monotonic() - began:.0f} s", flush=True)
    except SpecForgeError as exc:
        sys.exit(f"error: {exc}")
    if compare.failed:
        sys.exit(f"failed: {', '.join(compare.failed)}. The same command does what is left")


if __name__ == "__main__":
    main()
