"""The memory that a process can still have: the device's, the machine's, its container's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path("/")
CONTROLLERS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": (
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}
"""Of control groups, version 2 and 1, by the name in ``/proc/self/cgroup``: where they are, the
files of limit and use, and the part of the use that the system takes back when it needs to."""


def free_bytes(device: torch.device) -> int | None:
    """What a process can still have on a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min((*_free_on_machine(), *_free_in_groups()), default=None)


def _free_on_machine() -> Iterator[int]:
    try:
        for line in (ROOT / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                yield 1024 * int(line.split()[1])
                return
        yield os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return


def _free_in_groups() -> Iterator[int]:
    """What every control group with a limit leaves, from the process's own up to the outermost."""
    try:
        lines = (ROOT / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        for name in CONTROLLERS.keys() & set(controllers.split(",")):
            place, *files = CONTROLLERS[name]
            own = ROOT / place / path.lstrip("/")
            for folder in (own, *own.parents[: len(Path(path).parts) - 1]):
                yield from _free_in_group(folder, *files)


def _free_in_group(folder: Path, limit: str, used: str, reclaimed: str) -> Iterator[int]:
    try:
        most, now = ((folder / name).read_text(encoding="ascii") for name in (limit, used))
        stat = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = dict(line.split() for line in stat).get(reclaimed, "0")
        if most.strip() != "max":
            yield max(0, int(most) - int(now) + int(cached))
    except (OSError, ValueError):  # no such group in this container's view
        return
