"""Kernels' sources over the stand-ins, and launches that reach them."""

import builtins
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from triton.experimental.gluon._runtime import GluonJITFunction

from fedalt_kernels.triton.hopper import planning, record
from fedalt_kernels.triton.launch import Launch

from . import language
from .memory import Descriptor, Global, Pointer
from .scheduler import Fault, Scheduler

ORDER = ("blocks", "ring", "gates", "makers", "sums", "forward", "backward")
Kernels = dict[str, types.ModuleType]


def load(*changes: tuple[str, str, str]) -> Kernels:
    """The kernels' modules; with `changes`, of a file's text one by another."""
    modules: Kernels = {}

    def importing(name: str, *rest: Any) -> Any:
        level = rest[3] if len(rest) > 3 else 0
        if level:
            return modules[name]
        if name == "triton.experimental":
            return types.SimpleNamespace(gluon=language.gluon)
        if name == "triton.experimental.gluon":
            return types.SimpleNamespace(language=language.gl)
        if name.startswith("triton.experimental.gluon.language"):
            return language.hopper
        return builtins.__import__(name, *rest)

    space = {**vars(builtins), "__import__": importing}
    for name in ORDER:
        path = record.FOLDER / f"{name}.py"
        text = path.read_text(encoding="utf-8")
        for file, old, new in changes:
            if file == name:
                if text.count(old) == 0:
                    raise LookupError(f"{file}.py has no {old!r}")
                text = text.replace(old, new)
        module = modules[name] = types.ModuleType(name)
        vars(module)["__builtins__"] = space
        exec(compile(text, str(path), "exec"), vars(module))
    return modules


def run(kernels: Kernels, launch: Launch, tensors: tuple[Any, ...], seed: int) -> None:
    """One launch."""
    name = launch.kernel.fn.__name__
    kernel = next(vars(module)[name] for module in kernels.values() if name in vars(module))
    memories: dict[int, Global] = {}
    given = dict(zip(launch.tensors, tensors, strict=True)) | launch.constants
    arguments = [_argument(launch, each, given[each], memories) for each in launch.kernel.arg_names]
    scheduler = Scheduler(seed, launch.grid[0])
    for program in range(launch.grid[0]):
        scheduler.spawn(f"program {program}", program, lambda: kernel(*arguments))
    scheduler.run()
    if given["counts"].any():
        raise Fault("counters are left dirty")


def _argument(launch: Launch, name: str, value: Any, memories: dict[int, Global]) -> Any:
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage().data_ptr()
        memory = memories.setdefault(storage, Global(value))
        box = launch.boxes.get(name)
        if box is None:
            return Pointer(memory, value.storage_offset())
        if value.storage_offset() != memory.start:
            memory = Global(value)
        return Descriptor(memory, (box.height, box.width), box.stride, box.block)
    return value._shape if name == "S" else value


@contextmanager
def launched(kernels: Kernels, seed: int = 0, programs: int = 3) -> Iterator[None]:
    """Gluon kernels are launched here, and may serve on a CPU."""
    launching = Launch.__call__

    def call(self: Launch, *tensors: Any) -> None:
        if isinstance(self.kernel, GluonJITFunction):
            run(kernels, self, tensors, seed)
        else:
            launching(self, *tensors)

    changed: list[tuple[Any, str, Callable[..., Any]]] = [
        (Launch, "__call__", call),
        (planning, "runs_on", lambda device: True),
        (planning, "programs", lambda device: programs),
    ]
    with patch.object(*changed[0]), patch.object(*changed[1]), patch.object(*changed[2]):
        yield
