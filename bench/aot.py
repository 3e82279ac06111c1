"""Every kernel that ships, compiled ahead of time for every target: no GPU is needed.

The launchers themselves say what to compile: they are run on small CPU tensors while their launches
are recorded, not made.  Each launch (kernel, tile, dtype, flags) is then compiled for its target,
and what the assembler reports is held to the target's limits.

    python -m bench compile
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fedalt_kernels import plans
from fedalt_kernels.triton import tiles
from fedalt_kernels.triton.hopper import planning

from .measure import markdown
from .setups import run_clients, run_schedules, setups


@dataclass(frozen=True)
class Target:
    """What to compile for, and the shared memory one program may have there."""

    gpu: GPUTarget
    most_shared: int
    matrix: str  # the instruction a product of 16-bit blocks must have become


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 166_912, "HMMA"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 232_448, "HGMMA"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 232_448, "UTC.?MMA|HMMA"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 65_536, "v_mfma"),
}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
NAMING = ("x", "dy", "left", "source", "packed", "side", "words", "y")  # whose dtype is told
NAMES = tuple(DTYPES.values())
POINTED = {
    **DTYPES,
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """One recorded launch, as the compiler takes it."""

    kernel: JITFunction
    label: str
    signature: dict[str, Any]
    constants: dict[Any, Any]
    divisible: tuple[Any, ...]
    warps: int
    rows: int
    key: str = field(compare=False, default="")


@dataclass(frozen=True)
class Compiled:
    """What became of a launch on one target."""

    target: str
    kernel: str
    label: str
    registers: int
    shared: int
    spilled: int
    products: int
    fault: str

    def row(self) -> tuple[object, ...]:
        return (
            self.target,
            self.kernel,
            self.label,
            self.registers,
            self.shared,
            self.spilled,
            self.products,
            self.fault or "ok",
        )


HEADER = (
    "target",
    "kernel",
    "tile",
    "registers",
    "shared bytes",
    "spilled",
    "matrix instructions",
    "verdict",
)


def launches(target: str, dtype: torch.dtype) -> list[Launch]:
    """Every launch that the shipped tiles and flags lead to on a target, each once."""
    found: dict[str, Launch] = {}
    with _recording(target, found):
        for setup in setups(target, dtype):
            run_schedules(dtype, setup)
        run_clients(dtype)
    return list(found.values())


@contextmanager
def _recording(target: str, found: dict[str, Launch]) -> Iterator[None]:
    def record(kernel: JITFunction, *_: Any, grid: Any, warmup: bool, **given: Any) -> None:
        launch = _described(kernel, given)
        found.setdefault(launch.key, launch)

    plans.forget()  # another target's
    with (
        patch.object(JITFunction, "run", record),
        patch.object(tiles, "architecture", lambda device: target),
        patch.object(planning, "architecture", lambda device: target),
        patch.object(tiles, "tuned", lambda device: {}),
    ):
        yield
    plans.forget()


def _described(kernel: JITFunction, given: dict[str, Any]) -> Launch:
    warps = given.pop("num_warps", 4)
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    divisible: list[Any] = []
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        signature[parameter.name] = _type_of(value)
        if isinstance(value, tuple):
            divisible += [(i, j) for j, each in enumerate(value) if isinstance(each, Tensor)]
        elif isinstance(value, Tensor) or (
            isinstance(value, int) and not parameter.do_not_specialize and value % 16 == 0
        ):
            divisible.append((i,))
    tile = {
        name: given[name]
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_C", "BLOCK_R", "STAGES")
        if name in given
    }
    flags = [
        name.lower()
        for name in ("TMA", "DROPOUT", "JOINT", "MAKES_UP", "BACKWARD", "BASE")
        if given.get(name)
    ]
    if given.get("QUANTIZED"):
        flags += [POINTED[given["weight"].dtype], *map(str, given["BLOCKS"])]
    elif "target" in given:
        flags += ["to", POINTED[given["target"].dtype], *map(str, given.get("BLOCKS", ()))]
    named = (given.get(name) for name in NAMING)
    first = next(value for value in named if value is not None)
    dtype = POINTED[first.dtype if isinstance(first, Tensor) else first.base.dtype]
    if "S" in given:
        tile, flags = _traits(given["S"])
    rows = tile.get("BLOCK_M", 0) if "S" in given else given.get("BLOCK_C", given.get("BLOCK_M", 0))
    label = " ".join([dtype, "x".join(str(size) for size in tile.values()), *flags])
    key = f"{kernel.__name__} {signature} {constants} {divisible} {warps}"
    return Launch(kernel, label, signature, constants, tuple(divisible), warps, rows, key)


def _traits(shape: Any) -> tuple[dict[str, int], list[str]]:
    """What is to be told of a shape of Hopper's kernels."""
    tile = {name: getattr(shape, name).value for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    flags = [f"ranks {shape.EDGES.value[1:]}"]
    for name in ("GATED", "DROPOUT", "OUT_MAJOR"):
        if getattr(shape, name).value:
            flags.append(name.lower())
    return tile, flags


def _type_of(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_type_of(each) for each in value)
    if isinstance(value, Tensor):
        return "*" + POINTED[value.dtype]
    if isinstance(value, GluonDescriptor):
        sides = list(value.block_shape)
        return f"tensordesc<{DTYPES[value.base.dtype]}{sides},{value.layout!r}>"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{DTYPES[value.base.dtype]}{list(value.block_shape)}>"
    return "fp32" if isinstance(value, float) else "i32"


def compile_launch(target: str, launch: Launch) -> Compiled:
    """Compiles and reads what the assembler made of it."""
    kernel, limits = launch.kernel.__name__.lstrip("_"), TARGETS[target]
    own = isinstance(launch.kernel, GluonJITFunction)
    source = (GluonASTSource if own else ASTSource)(
        fn=launch.kernel,
        signature=launch.signature,
        constexprs=launch.constants,
        attrs={place: [["tt.divisibility", 16]] for place in launch.divisible},
    )
    try:
        made = triton.compile(source, target=limits.gpu, options={"num_warps": launch.warps})
    except Exception as error:  # the compiler's own faults are of many types
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:120]}"
        return Compiled(target, kernel, launch.label, 0, 0, 0, 0, reason)
    if "cubin" in made.asm:
        registers, spilled, code = _read_cubin(made.asm["cubin"])
    else:
        code = made.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1])
        spilled = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code)[1])
    # A Hopper warp group's product has 64 rows; where a tile has fewer, the older one serves.
    matrix = limits.matrix if launch.rows >= 64 else limits.matrix.replace("HG", "HG?")
    products = len(re.findall(matrix, code))
    faults = []
    if spilled:
        faults.append("spills")
    if made.metadata.shared > limits.most_shared:
        faults.append(f"shared memory over {limits.most_shared}")
    if own:
        faults += _missing(code)
    if not products and "fp32" not in launch.label and "dot" in made.asm["ttgir"]:
        faults.append(f"no {matrix}")
    return Compiled(
        target,
        kernel,
        launch.label,
        registers,
        made.metadata.shared,
        spilled,
        products,
        ", ".join(faults),
    )


def _missing(code: str) -> list[str]:
    """What a kernel of Hopper's own lacks: copies, registers for consumers, products in flight.

    The assembler makes every product wait for the one before where registers are too few for it.
    """
    faults = [f"no {name}" for name in ("UTMALDG", "USETMAXREG") if name not in code]
    if len(re.findall("WARPGROUP.DEPBAR", code)) >= len(re.findall("HGMMA", code)):
        faults.append("serialized products")
    return faults


def _read_cubin(cubin: bytes) -> tuple[int, int, str]:
    """Registers a thread, spilled bytes and spilling instructions, and the machine code's text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used = _cuobjdump("-res-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    registers, local = re.search(r"REG:(\d+).*?LOCAL:(\d+)", used).groups()
    return int(registers), int(local) + len(re.findall(r"\b(?:STL|LDL)\b", code)), code


def _cuobjdump(flag: str, path: str) -> str:
    done = subprocess.run(
        [BINARIES / "cuobjdump", flag, path], capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


def compile_all(target: str, name: str) -> list[Compiled]:
    """Every launch of one target and dtype."""
    dtype = next(dtype for dtype, short in DTYPES.items() if short == name)
    return [compile_launch(target, launch) for launch in launches(target, dtype)]


def main(targets: Sequence[str] = tuple(TARGETS), dtypes: Sequence[str] = NAMES) -> int:
    """Prints the table; 1 if anything is at fault."""
    pairs = [(target, dtype) for target in targets for dtype in dtypes]
    results: list[Compiled] = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for made in pool.map(compile_all, *zip(*pairs, strict=True)):
            results += made
            print(f"{len(results)} compiled by Triton {triton.__version__}", file=sys.stderr)
    print(markdown(HEADER, [each.row() for each in results]))
    return int(any(each.fault for each in results))
