"""What the CPU can do is read from files and the environment, and measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specforge_core import cpu

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    cpu.has_fast_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu avx2 amx_bf16\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f\nmodel name\t: bf16\n", False),
    ],
)
def test_instructions_are_read_from_cpuinfo(tmp_path: Path, text: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu.has_bfloat16_instructions(tmp_path / "cpuinfo") is expected
    assert not cpu.has_bfloat16_instructions(tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI", True),
        ("ONEDNN_MAX_CPU_ISA", "avx2", True),
        ("DNNL_MAX_CPU_ISA", "AVX512_CORE", True),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", False),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", False),
        ("ATEN_CPU_CAPABILITY", "avx2", True),
        ("ATEN_CPU_CAPABILITY", "avx512", False),
        ("OMP_NUM_THREADS", "1", False),
    ],
)
def test_the_environments_caps_are_kept(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: bool
) -> None:
    monkeypatch.setenv(name, value)
    assert cpu.forbids_bfloat16() is expected


@pytest.mark.parametrize(
    ("listed", "cap", "bfloat16", "expected"),
    [
        (True, None, 1.0, True),
        (True, None, 1.9, False),  # no gain
        (False, None, 1.0, False),
        (True, "AVX2", 1.0, False),
    ],
)
def test_bfloat16_must_be_there_and_win(
    monkeypatch: pytest.MonkeyPatch, listed: bool, cap: str | None, bfloat16: float, expected: bool
) -> None:
    monkeypatch.setattr(cpu, "has_bfloat16_instructions", lambda _: listed)
    monkeypatch.setattr(cpu, "_seconds", {torch.bfloat16: bfloat16, torch.float32: 2.0}.get)
    if cap is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    assert cpu.has_fast_bfloat16() is expected
    assert cpu.pick_dtype("auto", CPU) == (torch.bfloat16 if expected else torch.float32)
    assert cpu.pick_target_dtype("auto", "bfloat16", CPU) == ("bfloat16" if expected else "float32")


def test_the_race_is_run() -> None:
    assert 0 < cpu._seconds(torch.float32) < 1


@pytest.mark.parametrize("fast", [True, False])
def test_only_auto_on_a_cpu_is_decided_here(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(cpu, "has_fast_bfloat16", lambda: fast)
    assert cpu.pick_dtype("auto", GPU) == torch.bfloat16
    assert cpu.pick_target_dtype("auto", "float32", GPU) == "auto"
    for own in ("float32", "float16", None):
        assert cpu.pick_target_dtype("auto", own, CPU) == "float32"
    assert cpu.pick_target_dtype("bfloat16", "float32", CPU) == "bfloat16"
    assert cpu.pick_dtype("bfloat16", CPU) == torch.bfloat16


def topology(directory: Path, cores: list[int]) -> Path:
    for number, core in enumerate(cores):
        place = directory / f"cpu{number}" / "topology"
        place.mkdir(parents=True)
        (place / "core_id").write_text(f"{core}\n")
        (place / "physical_package_id").write_text("0\n")
    return directory


@pytest.mark.parametrize(
    ("affinity", "quota", "expected"),
    [
        ({0, 1, 2, 3}, "max 100000", 2),  # two hardware threads a core
        ({0, 1}, "max 100000", 1),
        ({0, 2}, None, 2),
        ({0, 1, 2, 3}, "150000 100000", 1),
        ({0, 1, 2, 3}, "50000 100000", 1),
        ({0, 7}, "max 100000", 2),  # one that the topology does not tell of
    ],
)
def test_cores_are_physical_and_only_those_of_this_process(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    affinity: set[int],
    quota: str | None,
    expected: int,
) -> None:
    monkeypatch.setattr(cpu, "_affinity", lambda: affinity)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    found = cpu.available_cores(topology(tmp_path / "cpus", [0, 0, 1, 1]), tmp_path / "cpu.max")
    assert found == expected


@pytest.mark.parametrize(
    ("gpu", "asked", "environment", "beside", "expected"),
    [
        (True, None, None, False, [4]),
        (False, None, None, False, [16]),
        (False, None, None, True, [8]),
        (False, None, "3", True, []),
        (False, 5, "3", True, [5]),
    ],
)
def test_threads_share_the_cores(
    monkeypatch: pytest.MonkeyPatch,
    gpu: bool,
    asked: int | None,
    environment: str | None,
    beside: bool,
    expected: list[int],
) -> None:
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(cpu, "available_cores", lambda: 16)
    if environment is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    cpu.use_threads(asked, beside=beside)
    assert found == expected
