"""Frames over HTTP: what is expected is let in; others, slow, large and many cost little."""

from __future__ import annotations

import http.client
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import torch
from specforge_sglang import receiver as receiving
from specforge_sglang.options import SGLangOptions
from specforge_sglang.receiver import HttpHandoff, open_handoff
from specforge_sglang_capture.ask import Ask, parse
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
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request("POST", f"/{token}/{name}", body)
    status = connection.getresponse().status
    connection.close()
    return status


def test_a_body_is_received_in_full(receiver: HttpHandoff, tmp_path: Path) -> None:
    state = torch.randn(3000, 64).to(torch.bfloat16)
    pieces = pack({"name": "a"}, torch.arange(3000), [state])
    receiver.expect("a")
    sender = Sender(tmp_path, receivers=["127.0.0.1"])
    sender.put(Parcel(Ask("a", "http", receiver.place, (0,), "none"), 1, lambda: pieces))
    assert torch.equal(unpack(receiver.take("a", 20)).states[0], state)
    assert receiver.take("a", 0) is None  # once


def test_only_what_is_expected_is_let_in(receiver: HttpHandoff) -> None:
    receiver.expect("a")
    place = receiver.place
    assert post(place, "b", b"x") == 404
    assert post(place.split("/")[0] + "/guess", "a", b"x") == 404
    assert post(place, "a", b"x") == 200
    assert post(place, "a", b"y") == 404  # not twice
    assert bytes(receiver.take("a", 20)) == b"x"


def test_what_is_forgotten_is_refused(receiver: HttpHandoff) -> None:
    receiver.expect("a")
    receiver.forget("a")
    assert post(receiver.place, "a", b"x") == 404


def test_a_writer_that_dies_midway_leaves_nothing(receiver: HttpHandoff) -> None:
    address, token = receiver.place.split("/")
    receiver.expect("a")
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.putrequest("POST", f"/{token}/a")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"only this")
    connection.close()
    assert receiver.take("a", 0.3) is None
    assert post(receiver.place, "a", b"again") == 200
    assert bytes(receiver.take("a", 20)) == b"again"


def test_a_port_that_is_taken_is_named(receiver: HttpHandoff) -> None:
    port = int(receiver.place.split("/")[0].split(":")[1])
    with pytest.raises(ConfigError, match=rf"port {port} .*target\.options\.receiver_port=0"):
        HttpHandoff("127.0.0.1", port)


def listening() -> list[tuple[str, int]]:
    """Return the addresses (as the kernel spells them) and ports that are listened on."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                address, port = fields[1].split(":")
                found.append((address, int(port, 16)))
    return found


@pytest.mark.parametrize("host", [None, "127.0.0.1", "localhost"])
def test_nothing_but_loopback_is_listened_on(host: str | None) -> None:
    made = HttpHandoff(host)
    port = int(made.place.split("/")[0].rpartition(":")[2])
    loopback = {"0100007F", "00000000000000000000000001000000"}
    assert {address for address, found in listening() if found == port} <= loopback
    made.close()


def test_it_listens_where_it_is_told_and_is_called_what_it_is_told() -> None:
    made = HttpHandoff("trainer.example", bind="0.0.0.0")
    host, port = made.place.split("/")[0].split(":")
    assert host == "trainer.example"
    assert ("00000000", int(port)) in listening()
    made.close()


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"port 0 of '192\.0\.2\.1'.*target\.options\.receiver_bind="
    ):
        HttpHandoff("192.0.2.1")


def test_servers_elsewhere_need_to_know_how_this_machine_is_called() -> None:
    options = SGLangOptions(urls=("http://192.0.2.1:30000",))
    with pytest.raises(ConfigError, match=r"Try: target\.options\.receiver_host=NAME"):
        open_handoff(options)
    made = open_handoff(options.model_copy(update={"receiver_host": "127.0.0.1"}))
    assert made.place.startswith("127.0.0.1:")
    made.close()


def ask(place: str, head: str, body: bytes = b"") -> bytes:
    """Send a request as it is spelled, and return what comes back."""
    host, port = place.split("/")[0].split(":")
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        sock.sendall(f"POST /{place.split('/')[1]}/a HTTP/1.1\r\n{head}\r\n".encode() + body)
        return sock.makefile("rb").read()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("Content-Length: 11\r\n", b" 413 "),
        ("Content-Length: 1000000000000000000000000000\r\n", b" 413 "),
        ("Content-Length: -1\r\n", b" 411 "),
        ("Content-Length: ten\r\n", b" 411 "),
        ("", b" 411 "),
        ("Transfer-Encoding: chunked\r\n", b" 411 "),
        ("Content-Length: 10\r\n", b" 200 "),
    ],
)
def test_a_body_has_a_length_and_no_more_than_the_frame(
    receiver: HttpHandoff, head: str, status: bytes
) -> None:
    receiver.expect("a", 10)
    assert status in ask(receiver.place, head, b"x" * 10 if status == b" 200 " else b"")


def test_a_token_of_any_letters_is_refused(receiver: HttpHandoff) -> None:
    receiver.expect("a")
    port = receiver.place.split("/")[0]
    assert b" 404 " in ask(f"{port}/gu\xe9ss", "Content-Length: 1\r\n")


def test_connections_that_say_nothing_are_closed_and_are_not_many(
    receiver: HttpHandoff, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "HEAD_SECONDS", 0.5)
    host, port = receiver.place.split("/")[0].split(":")
    before = threading.active_count()
    with ExitStack() as stack:
        idle = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
            for _ in range(200)
        ]
        time.sleep(0.2)
        assert threading.active_count() - before <= receiving.MAX_CONNECTIONS
        for sock in idle:
            assert sock.recv(1) == b""  # closed, at once or in time
    receiver.expect("a")
    assert post(receiver.place, "a", b"x") == 200


def test_many_that_say_nothing_keep_nobody_out(receiver: HttpHandoff) -> None:
    """Also while the token's own connection is slow: strangers go first, the oldest of them."""
    host, port = receiver.place.split("/")[0].split(":")
    receiver.expect("slow")
    receiver.expect("a")
    with ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection((host, int(port)), timeout=20))

        slow = connect()
        head = f"POST /{receiver.place.split('/')[1]}/slow HTTP/1.1\r\nContent-Length: 2\r\n\r\n"
        slow.sendall(head.encode() + b"x")
        idle = [connect() for _ in range(receiving.MAX_CONNECTIONS + 5)]
        assert post(receiver.place, "a", b"x") == 200
        assert idle[0].recv(1) == b""
        slow.sendall(b"y")
        assert b" 200 " in slow.makefile("rb").read()
    assert bytes(receiver.take("slow", 20)) == b"xy"


def test_a_head_that_trickles_is_cut_off(
    receiver: HttpHandoff, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "HEAD_SECONDS", 0.5)
    host, port = receiver.place.split("/")[0].split(":")
    began = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=20) as sock, suppress(OSError):
        while time.monotonic() < began + 60:
            sock.sendall(b"P")
            time.sleep(0.05)
    assert time.monotonic() < began + 40


def test_a_body_that_stops_is_given_up(
    receiver: HttpHandoff, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "IDLE_SECONDS", 0.3)
    receiver.expect("a")
    began = time.monotonic()
    assert ask(receiver.place, "Content-Length: 100\r\n", b"only this") == b""
    assert time.monotonic() < began + 25  # and not 30
    assert post(receiver.place, "a", b"again") == 200


def test_a_request_cannot_make_a_server_call_elsewhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only receivers that the server was told of are called, whatever the request's id says."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.5)
        address = f"127.0.0.1:{other.getsockname()[1]}"
        asked = parse(f"specforge|2|http|{address}/token|0|none||n")
        assert asked is not None
        with caplog.at_level(logging.ERROR):
            for receivers in ([], ["trainer"], ["127.0.0.1:1"], ["localhost", "127.0.0"]):
                Sender(tmp_path, receivers=receivers).put(Parcel(asked, 1, lambda: []))
            with pytest.raises(TimeoutError):
                other.accept()
        assert f"SPECFORGE_SGLANG_RECEIVERS={address}" in caplog.text
        other.settimeout(20)
        Sender(tmp_path, receivers=["trainer", address]).put(Parcel(asked, 1, lambda: []))
        connection, _ = other.accept()
        connection.close()


def test_a_server_is_told_of_receivers_by_its_environment(
    receiver: HttpHandoff, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECFORGE_SGLANG_RECEIVERS", "other:1, 127.0.0.1")
    receiver.expect("a")
    asked = Ask("a", "http", receiver.place, (0,), "none")
    Sender(tmp_path).put(Parcel(asked, 1, lambda: [memoryview(b"x")]))
    assert bytes(receiver.take("a", 20)) == b"x"
