"""What the contract and the pool's size are read from: processor, compiler flags, memory."""

import subprocess
import sys

import pytest

from jaxengine.base import machine

EPYC = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel name\t: EPYC\nflags\t\t: fpu smep sse4_2 avx avx2 fma f16c"
GRAVITON = "BogoMIPS\t: 2100.00\nFeatures\t: fp asimd asimddp sve bf16 i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd40"


@pytest.mark.parametrize(
    "text, model, features",
    [
        (EPYC, "AuthenticAMD, 25, EPYC", ["avx", "avx2", "f16c", "fma", "sse4_2"]),
        (
            EPYC + " avx512f amx_bf16\n\nprocessor : 1\nflags : none",
            "AuthenticAMD, 25, EPYC",
            ["amx_bf16", "avx", "avx2", "avx512f", "f16c", "fma", "sse4_2"],
        ),
        (GRAVITON, "0x41, 0xd40", ["asimd", "asimddp", "bf16", "i8mm", "sve"]),
    ],
)
def test_processors(text, model, features, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "PROC", tmp_path)
    (tmp_path / "cpuinfo").write_text(text)
    assert machine.device() == {"kind": "cpu", "model": model, "features": features, "threads": machine.num_threads()}


def test_code_for_any_processor_is_told_nothing_of_it(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX --xla_a=1")
    assert machine.device(any_processor=True) == {"kind": "cpu"}
    assert machine.compiler_flags(any_processor=True) == {"xla_a": "1"}


def test_a_system_that_lists_no_processors(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert machine.device()["model"] and machine.device()["features"] == []


@pytest.mark.parametrize(
    "given, found",
    [
        ("", {}),
        (" --xla_force_host_platform_device_count=4 --xla_dump_to=/tmp", {}),
        ("--xla_cpu_max_isa=AVX2 --xla_a --xla_cpu_max_isa=SSE4_2", {"xla_cpu_max_isa": "SSE4_2", "xla_a": ""}),
    ],
)
def test_compiler_flags(given, found, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", given)
    assert machine.compiler_flags() == found
    (tmp_path / "flags").write_text(given)
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))
    assert machine.compiler_flags() == found


@pytest.mark.parametrize(
    "limits, free",
    [({}, 8), ({"": "6", "a": "max"}, 5), ({"a/b": "4"}, 3), ({"": "2", "a/b": "9"}, 1), ({"a": "0"}, 0)],
)
def test_free_memory_is_what_the_host_and_each_control_group_leave(limits, free, tmp_path, monkeypatch):
    """Of every group 3 units are taken, 2 of them by files that nobody reads."""
    unit = 1 << 20
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "groups")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(
        f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: {8 * unit // 1024} kB\n"
    )
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/old\n0::/a/b\n")
    for group, limit in limits.items():
        folder = tmp_path / "groups" / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in (
            ("max", limit if limit == "max" else int(limit) * unit),
            ("current", 3 * unit),
            ("stat", f"anon 1\ninactive_file {2 * unit}"),
        ):
            (folder / f"memory.{name}").write_text(f"{value}\n")
    assert machine.free_memory() == free * unit


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone tells")
@pytest.mark.parametrize("taken", [0, 200_000_000])
def test_a_peak_is_the_processs_own_and_stays(taken):
    """Its parent's counts in resource.getrusage; this one is larger than a bare interpreter."""
    code = f"x = b'x' * {taken}; del x; print('ready', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        peak = machine.peak_memory(child.pid)
        child.communicate(b"\n")
    assert taken + 1_000_000 < peak < taken + 50_000_000
    assert machine.peak_memory(child.pid) is None
