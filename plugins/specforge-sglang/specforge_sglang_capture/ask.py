"""What to capture from one request, written into the request's id.

The id is the only thing of a request that every SGLang version carries unchanged to the
model's forward pass, so it says which states are wanted and where they go.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from . import spool

Final = Literal["none", "pre_norm", "post_norm"]
Way = Literal["files", "http"]
Head = tuple[Literal["next_tokens", "logsumexp"], ...]
HEAD: Head = ("next_tokens", "logsumexp")

PREFIX = "specforge"
PROTOCOL = 2  # of requests and frames; another one on the other side is refused
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
    head: Head = ()  # what the model's head makes of every position
    protocol: int = PROTOCOL  # of who asks; with another one nothing else than the way is known

    @property
    def token(self) -> str:
        """What lets a frame in over http, and is nobody else's business; nothing for files."""
        return self.place.rpartition("/")[2] if self.way == "http" else ""

    def __str__(self) -> str:
        layers, head = ",".join(map(str, self.layers)), ",".join(self.head)
        # in every protocol the way and the place come first and the name last, so that a server
        # can say to any trainer that it speaks another one
        parts = (PREFIX, str(self.protocol), self.way, self.place, layers, self.final, head)
        return "|".join((*parts, self.name))


def parse(request_id: str) -> Ask | None:
    """Return what a request id asks for; None when it is not one of ours, or malformed."""
    prefix, *parts = request_id.split("|")
    if prefix != PREFIX or len(parts) < 4 or not parts[0].isdecimal():
        return None
    protocol, way, place, *wanted, name = parts
    known = {"files": NAME, "http": RECEIVER}
    if way not in known or not known[way].fullmatch(place) or not NAME.fullmatch(name):
        return None
    if name == spool.LOCK or name.startswith(spool.FREE):  # files of the directory's own
        return None
    if int(protocol) != PROTOCOL:
        return Ask(name, way, place, (), "none", protocol=int(protocol))  # type: ignore[arg-type]
    if len(wanted) != 3:
        return None
    layers, final, head = wanted
    values = tuple(value for value in head.split(",") if value)
    if final not in ("none", "pre_norm", "post_norm") or not re.fullmatch(r"[-0-9,]*", layers):
        return None
    if not set(values) <= set(HEAD):
        return None
    try:
        numbers = tuple(int(i) for i in layers.split(",") if i)
    except ValueError:
        return None
    return Ask(name, way, place, numbers, final, values)  # type: ignore[arg-type]
