"""What to capture from one request, written into the request's id.

The id is the only thing of a request that every SGLang version carries unchanged to the
model's forward pass, so it says which states are wanted and where they go.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Final = Literal["none", "pre_norm", "post_norm"]
Way = Literal["files", "http"]

PREFIX = "specforge|1"
NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
RECEIVER = re.compile(r"[A-Za-z0-9._:\[\]-]{1,200}/[A-Za-z0-9_-]{1,100}")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request for states.

    `place` is the name of a hand-off directory for files, and `host:port/token` for http.
    Layer i is the output of decoder layer i, counted from 0; -1 is the embedding output.
    """

    name: str  # unique among the requests of one trainer process
    way: Way
    place: str
    layers: tuple[int, ...]
    final: Final

    def __str__(self) -> str:
        layers = ",".join(map(str, self.layers))
        return "|".join((PREFIX, self.way, self.place, layers, self.final, self.name))


def parse(request_id: str) -> Ask | None:
    """Return what a request id asks for; None when it is not one of ours, or malformed."""
    if not request_id.startswith(PREFIX + "|"):
        return None
    parts = request_id.removeprefix(PREFIX + "|").split("|")
    if len(parts) != 5:
        return None
    way, place, layers, final, name = parts
    known = {"files": NAME, "http": RECEIVER}
    if way not in known or not known[way].fullmatch(place) or not NAME.fullmatch(name):
        return None
    if final not in ("none", "pre_norm", "post_norm") or not re.fullmatch(r"[-0-9,]*", layers):
        return None
    try:
        numbers = tuple(int(i) for i in layers.split(",") if i)
    except ValueError:
        return None
    return Ask(name, way, place, numbers, final)  # type: ignore[arg-type]
