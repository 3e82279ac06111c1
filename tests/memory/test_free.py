"""What is told to be free, in a machine and in control groups of both versions, on made files."""

import pytest
import torch

from fedalt.memory import free

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Makes files under a root that takes the place of ``/``."""
    monkeypatch.setattr(free, "ROOT", tmp_path)

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", f"MemTotal: {2**24} kB\nMemAvailable: {8 * 2**20} kB\n")
    return write


def group(write, folder, limit, used, cached, version):
    files = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    write(f"{folder}/{files[0]}", f"{limit}\n")
    write(f"{folder}/{files[1]}", f"{used}\n")
    write(f"{folder}/memory.stat", f"anon 1\n{files[2]} {cached}\n")


def test_without_limits_it_is_what_the_machine_has(write):
    assert free.free_bytes(CPU) == 8 * GIB
    write("proc/self/cgroup", "0::/\n")
    assert free.free_bytes(CPU) == 8 * GIB
    group(write, "sys/fs/cgroup", "max", GIB, 0, 2)
    assert free.free_bytes(CPU) == 8 * GIB


def test_the_tightest_group_on_the_way_up_counts(write):
    write("proc/self/cgroup", "0::/slurm/job\n")
    group(write, "sys/fs/cgroup/slurm/job", "max", GIB, 0, 2)
    assert free.free_bytes(CPU) == 8 * GIB
    group(write, "sys/fs/cgroup/slurm", 4 * GIB, 3 * GIB, GIB // 2, 2)
    assert free.free_bytes(CPU) == GIB + GIB // 2
    group(write, "sys/fs/cgroup/slurm/job", GIB, 2 * GIB, 0, 2)
    assert free.free_bytes(CPU) == 0


def test_groups_of_the_first_version_count(write):
    write("proc/self/cgroup", "5:cpu,memory:/docker\n4:cpu:/other\n")
    group(write, "sys/fs/cgroup/memory", 2**63 - 4096, 3 * GIB, 0, 1)
    group(write, "sys/fs/cgroup/memory/docker", 3 * GIB, GIB, 2**20, 1)
    assert free.free_bytes(CPU) == 2 * GIB + 2**20


def test_a_system_that_tells_nothing_is_not_guessed_at(write, tmp_path, monkeypatch):
    (tmp_path / "proc/meminfo").unlink()

    def unknown(name):
        raise ValueError(name)

    monkeypatch.setattr(free.os, "sysconf", unknown)
    assert free.free_bytes(CPU) is None
