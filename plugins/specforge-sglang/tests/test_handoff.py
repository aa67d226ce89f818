"""What arrives is read once and removed; what nobody waits for is thrown away."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from specforge_sglang.handoff import FileHandoff, HttpHandoff
from specforge_sglang_capture.ask import Ask
from specforge_sglang_capture.frame import pack, unpack
from specforge_sglang_capture.sender import Parcel, Sender

from specforge_core.errors import ConfigError


@pytest.fixture
def receiver() -> Iterator[HttpHandoff]:
    made = HttpHandoff("127.0.0.1")
    yield made
    made.close()


def post(place: str, name: str, body: bytes) -> int:
    address, token = place.split("/")
    connection = http.client.HTTPConnection(address, timeout=5)
    connection.request("POST", f"/{token}/{name}", body)
    status = connection.getresponse().status
    connection.close()
    return status


def test_a_file_is_unlinked_as_it_is_read(tmp_path: Path) -> None:
    reader = FileHandoff(tmp_path)
    (reader.path / "a").write_bytes(b"12345678")
    mapped = reader.take("a", 1)
    assert not (reader.path / "a").exists()
    assert bytes(mapped) == b"12345678"
    reader.close()
    assert bytes(mapped) == b"12345678"
    assert list(tmp_path.iterdir()) == []


def test_what_comes_too_late_is_deleted(tmp_path: Path) -> None:
    reader = FileHandoff(tmp_path)
    reader.forget("early")
    (reader.path / "late").write_bytes(b"x")
    reader.forget("late")
    assert not (reader.path / "late").exists()
    (reader.path / "early").write_bytes(b"x")
    reader.expect("next")
    assert not (reader.path / "early").exists()
    reader.close()


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent: No such file.*target\.options\.directory="):
        FileHandoff(tmp_path / "absent")


def test_a_body_is_received_in_full(receiver: HttpHandoff, tmp_path: Path) -> None:
    state = torch.randn(3000, 64).to(torch.bfloat16)
    pieces = pack({"name": "a"}, torch.arange(3000), [state])
    receiver.expect("a")
    Sender(tmp_path).put(Parcel(Ask("a", "http", receiver.place, (0,), "none"), 1, lambda: pieces))
    assert torch.equal(unpack(receiver.take("a", 5)).states[0], state)
    assert receiver.take("a", 0) is None  # once


def test_only_what_is_expected_is_let_in(receiver: HttpHandoff) -> None:
    receiver.expect("a")
    place = receiver.place
    assert post(place, "b", b"x") == 404
    assert post(place.split("/")[0] + "/guess", "a", b"x") == 404
    assert post(place, "a", b"x") == 200
    assert post(place, "a", b"y") == 404  # not twice
    assert bytes(receiver.take("a", 1)) == b"x"


def test_what_is_forgotten_is_refused(receiver: HttpHandoff) -> None:
    receiver.expect("a")
    receiver.forget("a")
    assert post(receiver.place, "a", b"x") == 404


def test_a_writer_that_dies_midway_leaves_nothing(receiver: HttpHandoff) -> None:
    address, token = receiver.place.split("/")
    receiver.expect("a")
    connection = http.client.HTTPConnection(address, timeout=5)
    connection.putrequest("POST", f"/{token}/a")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"only this")
    connection.close()
    assert receiver.take("a", 0.3) is None
    assert post(receiver.place, "a", b"again") == 200
    assert bytes(receiver.take("a", 1)) == b"again"


def test_a_port_that_is_taken_is_named(receiver: HttpHandoff) -> None:
    port = int(receiver.place.split("/")[0].split(":")[1])
    with pytest.raises(ConfigError, match=rf"port {port} .*target\.options\.receiver_port=0"):
        HttpHandoff("127.0.0.1", port)


def test_both_ways_have_the_same_interface(receiver: HttpHandoff, tmp_path: Path) -> None:
    files = FileHandoff(tmp_path)
    for handoff, way in ((files, "files"), (receiver, "http")):
        either: Any = handoff
        assert either.way == way
        either.expect("never")
        assert either.take("never", 0.01) is None
        either.forget("never")
    files.close()
