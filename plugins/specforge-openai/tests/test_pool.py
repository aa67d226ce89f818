"""Prompts go where the fewest tokens are outstanding; dead servers get none."""

from __future__ import annotations

import threading

import pytest
from specforge_openai.completions import Client
from specforge_openai.http_json import ServerDown
from specforge_openai.pool import Pool, Server, each

from specforge_core.errors import CaptureError, RunError


def down(client: Client) -> None:
    raise ServerDown("connection refused")


def make(count: int, patience: float = 0.2, check: object = down) -> Pool[Client]:
    servers = [Server(Client(f"http://s{i}", 1.0)) for i in range(count)]
    assert callable(check)
    return Pool(servers, check, patience)


def test_the_fewest_outstanding_tokens_win() -> None:
    pool = make(3)
    first, second, third = (pool.acquire(n) for n in (100, 10, 50))
    assert {first, second, third} == set(pool.servers)
    assert pool.acquire(60) is second  # 10 outstanding
    assert pool.acquire(1) is third  # 50, 70 and 100
    pool.release(first, 100, served=True)
    assert pool.acquire(1) is first
    assert [s.served for s in (first, second, third)] == [1, 0, 0]


def test_a_retired_server_gets_nothing() -> None:
    pool = make(2)
    gone = pool.acquire(1)
    pool.retire(gone, "killed")
    assert all(pool.acquire(100) is not gone for _ in range(5))


def test_a_server_that_answers_again_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specforge_openai.pool.RETRY_SECONDS", 0.05)
    looks = []

    def back_at_the_third_look(client: Client) -> None:
        looks.append(client.url)
        if len(looks) < 3:
            raise ServerDown("not yet")

    pool = make(1, 20.0, back_at_the_third_look)
    pool.retire(pool.servers[0], "killed")
    assert pool.acquire(1) is pool.servers[0]
    assert looks == ["http://s0"] * 3


def test_one_thread_at_a_time_looks_at_a_dead_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specforge_openai.pool.RETRY_SECONDS", 0.0)
    inside, most = [0], [0]
    gate = threading.Barrier(1)

    def look(client: Client) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        gate.wait()
        inside[0] -= 1

    pool = make(1, 20.0, look)
    pool.retire(pool.servers[0], "killed")
    threads = [threading.Thread(target=pool.acquire, args=(1,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most == [1]
    assert pool.servers[0].outstanding == 8


def test_the_error_lists_every_server_and_why() -> None:
    pool = make(2)
    pool.retire(pool.servers[0], "HTTP 500: out of memory")
    pool.retire(pool.servers[1], "timed out")
    message = r"http://s0: HTTP 500: out of memory\n +http://s1: timed out\nTry: start them again"
    with pytest.raises(RunError, match=message):
        pool.acquire(1)


def test_a_wrong_server_in_the_place_of_the_old_one_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("specforge_openai.pool.RETRY_SECONDS", 0.0)

    def look(client: Client) -> None:
        raise CaptureError("it needs: --disable-radix-cache")

    pool = make(1, 20.0, look)
    pool.retire(pool.servers[0], "killed")
    with pytest.raises(CaptureError, match="--disable-radix-cache"):
        pool.acquire(1)


def test_what_fails_after_the_end_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    pool = make(2)
    pool.retire(pool.servers[0], "killed")
    pool.closed = True
    pool.retire(pool.servers[1], "its states did not come")
    told = capsys.readouterr().err
    assert "http://s0 failed (killed)" in told
    assert "http://s1" not in told


def test_closing_ends_the_wait() -> None:
    pool = make(1, 60.0)
    pool.retire(pool.servers[0], "killed")
    threading.Timer(0.1, setattr, (pool, "closed", True)).start()
    with pytest.raises(CaptureError, match="was closed"):
        pool.acquire(1)


def test_each_yields_what_is_finished_and_runs_a_bounded_number() -> None:
    last, running, most = threading.Event(), [0], [0]
    lock = threading.Lock()

    def work(item: int) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        if item == 0:
            assert last.wait(60)
        with lock:
            running[0] -= 1
        return item * 10

    found = []
    for result in each(range(12), work, 3):
        found.append(result)
        if len(found) == 11:
            last.set()
    assert sorted(found) == [10 * i for i in range(12)]
    assert found[-1] == 0
    assert 2 <= most[0] <= 3


def test_each_raises_the_first_failure_after_what_was_finished() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise CaptureError("three")
        return item

    found = []
    with pytest.raises(CaptureError, match="three"):
        found.extend(each(range(100), work, 1))
    results = each(range(5), work, 1)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    results.close()  # type: ignore[attr-defined]
