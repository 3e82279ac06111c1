"""A GPU that is not there: the host does all of its work for a launch, and nothing is launched.

Triton is given a driver that says sm_90, loads no binary, encodes no descriptor and only counts
what it is told to launch.  Kernels are compiled for that target as ever, and on tensors of a CPU
the package takes a Hopper's tiles and schedules, its multiprocessors apart: there is one, so that
no matrix has too few tiles and a tiny call takes the way of a large one.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections import Counter
from functools import cache
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

import fedalt_kernels

TARGET = GPUTarget("cuda", 90, 32)
MOST_SHARED = 232_448
MOST_COUNTERS = 2**12


class TensorMap:
    """A descriptor as the CUDA driver would have encoded it."""


class Driver(nvidia.CudaDriver):
    """Triton's own for CUDA, but for what asks the device or changes it."""

    def __init__(self, launched: Counter[str]) -> None:
        handles, names = count(1), {}

        def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
            handle = next(handles)
            names[handle] = name
            return handle, handle, 0, 0, 1024  # module, function, registers, spills, threads

        def launch(x: int, y: int, z: int, stream: int, function: int, *_: Any) -> None:
            launched[names[function]] += 1

        def encode(*_: Any) -> TensorMap:
            return TensorMap()

        self.utils = SimpleNamespace(
            load_binary=load_binary,
            get_device_properties=lambda device: {"max_shared_mem": MOST_SHARED},
            # Triton 3.7 has one launcher, and encodes arguments by annotations.
            launch=launch,
            build_signature_metadata=lambda signature: bytes(len(signature)),
            fill_tma_descriptor_tiled=encode,
            # Triton 3.6 compiles a launcher for each signature.
            fill_tma_descriptor=encode,
        )
        vars(nvidia).update(
            PyKernelArg=SimpleNamespace,
            PyCUtensorMap=TensorMap,
            compile_module_from_src=lambda **_: SimpleNamespace(launch=launch),
            library_dirs=list,
        )
        self.launcher_cls = nvidia.CudaLauncher
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device: divmod(TARGET.arch, 10)

    def get_current_target(self) -> GPUTarget:
        return TARGET


def install() -> Counter[str]:
    """Puts the stand-in in place for the rest of the process; returns the launches, by kernel.

    Raises:
        RuntimeError: the package has no function that must be replaced.
    """
    launched: Counter[str] = Counter()
    driver.set_active(Driver(launched))
    for found in pkgutil.walk_packages(fedalt_kernels.__path__, "fedalt_kernels."):
        importlib.import_module(found.name)
    zeros = torch.zeros(MOST_COUNTERS, dtype=torch.int32)
    _replace("triton.tiles", "architecture", cache(lambda device: "sm_90"))
    _replace("triton.tiles", "tuned", cache(lambda device: {}))
    _replace("triton.tiles", "programs", lambda device: 1)
    _replace("triton.workspace", "counters", lambda device, length: zeros)
    _replace("choice", "_unsupported", lambda device, dtype: None)
    return launched


def _replace(module: str, name: str, stand_in: Any) -> None:
    """Gives every module of the package that has a function of its another one."""
    original = getattr(sys.modules.get(f"fedalt_kernels.{module}"), name, None)
    if original is None:
        raise RuntimeError(f"fedalt_kernels.{module}.{name} is gone: what stands in for it?")
    for key, each in list(sys.modules.items()):
        if key.startswith("fedalt_kernels") and vars(each).get(name) is original:
            setattr(each, name, stand_in)
