"""A kernel bound to its grid and constants, launched at the price of Triton's C launcher.

Triton's own way to a kernel binds, specializes and looks up every argument of every call, and makes
a descriptor in Python of every matrix that goes through one: 50 to 120 µs.  Here all of that
happens once, at the first call; the next ones fill in addresses and call what Triton calls last.

Of Triton 3.6 and 3.7 on NVIDIA this relies upon: `CompiledKernel.run` being a `CudaLauncher`, the
order in which that calls its C function, descriptors being passed as [map, sizes, strides], made by
`fill_tma_descriptor` (3.7: `fill_tma_descriptor_tiled`) from `metadata.tensordesc_meta`, addresses
being taken as integers, and arguments after the kernel's order, constants in their places.  Any
other version or vendor, the interpreter and whoever listens to launches by Triton's hooks get
Triton's own way.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

KNOWN = ("3.6", "3.7")
MOST_MAPS = 256  # of one argument: weights stay, and memory of the rest is given out again
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_HOOKS = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)


class Box(NamedTuple):
    """How a descriptor sees a row-major matrix: its sides, the rows' stride, a block's sides."""

    height: int
    width: int
    stride: int
    block: tuple[int, int]


class Launch:
    """One kernel with everything bound but the tensors.

    It may be kept as long as what it was made for stays: the tensors' dtypes, and sizes and strides
    as far as constants and boxes tell of them.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        tensors: Sequence[str],
        boxes: dict[str, Box | None] | None = None,
        warps: int = 4,
        **constants: Any,
    ) -> None:
        """
        Args:
            kernel: a `triton.jit` function.
            grid: of one to three sides.
            tensors: the parameters that a call gives, in its order; each a Tensor, None or a tuple
                of Tensors, and of the same kind at every call.
            boxes: by parameter, the descriptor it goes through; None or nothing: it goes as it is.
            warps: of a program.
            constants: all the other parameters.
        """
        self.kernel, self.grid, self.tensors = kernel, grid, tuple(tensors)
        self.boxes = {name: box for name, box in (boxes or {}).items() if box is not None}
        self.warps, self.constants = warps, constants
        self._direct: Any = None
        self._settled = False

    def __call__(self, *tensors: Any) -> None:
        """Launches on the current stream of the current device, which is the tensors'."""
        direct = self._direct
        if direct is not None and not (_HOOKS[0].calls or _HOOKS[1].calls) and direct(tensors):
            return
        given = {
            name: self._described(name, tensor)
            for name, tensor in zip(self.tensors, tensors, strict=True)
        }
        compiled = self.kernel[self.grid](**given, **self.constants, num_warps=self.warps)
        if not self._settled:
            self._settled = True
            self._direct = _direct(self, compiled, tensors)

    def _described(self, name: str, tensor: Any) -> Any:
        box = self.boxes.get(name)
        if box is None or tensor is None:
            return tensor
        height, width, stride, block = box
        if isinstance(self.kernel, GluonJITFunction):
            layout = gl.NVMMASharedLayout.get_default_for(list(block), DTYPES[tensor.dtype])
            return GluonDescriptor(tensor, [height, width], [stride, 1], list(block), layout)
        return TensorDescriptor(tensor, [height, width], [stride, 1], list(block))


def _direct(launch: Launch, compiled: Any, tensors: Sequence[Any]) -> Any:
    """A function that launches and returns True, or returns False where it may not; or None."""
    if torch.version.hip is not None or knobs.runtime.interpret or compiled is None:
        return None
    try:
        return _bound(launch, compiled, tensors)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        _warn_once(f"{type(error).__name__}: {error}")
        return None


def _bound(launch: Launch, compiled: Any, tensors: Sequence[Any]) -> Any:
    version = ".".join(triton.__version__.split(".")[:2])
    if version not in KNOWN:
        raise ValueError(f"Triton {triton.__version__} is not among {', '.join(KNOWN)}")
    run = compiled.run
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    template, addresses, tuples, boxes = _layout(launch, compiled, tensors)
    head = (*launch.grid, *(1,) * (3 - len(launch.grid)))
    flags = bool(run.launch_cooperative_grid), bool(run.launch_pdl)
    function, packed = compiled.function, compiled.packed_metadata
    utils = driver.active.utils
    stream_of, device = driver.active.get_current_stream, driver.active.get_current_device()
    if version == "3.7":
        launcher, fill = utils.launch, utils.fill_tma_descriptor_tiled
        notes = None, None, None, None, None, run.arg_annotations, run.kernel_signature

        def enter(values: list[Any]) -> None:
            launcher(*head, stream_of(device), function, *flags, packed, *notes, values)

    else:
        launcher, fill = _launcher_of(run), utils.fill_tma_descriptor

        def enter(values: list[Any]) -> None:
            here = stream_of(device)
            launcher(*head, here, function, *flags, None, None, packed, None, None, None, *values)

    def direct(tensors: Sequence[Any]) -> bool:
        values, low_bits = template.copy(), 0
        for place, i in addresses:
            values[place] = address = tensors[i].data_ptr()
            low_bits |= address
        for place, i in tuples:
            values[place] = several = tuple([each.data_ptr() for each in tensors[i]])
            for address in several:
                low_bits |= address
        for place, i, before, after, made in boxes:
            address = tensors[i].data_ptr()
            low_bits |= address
            found = made.get(address)
            if found is None:
                if len(made) >= MOST_MAPS:
                    made.clear()
                found = made[address] = fill(address, *before, *after)
            values[place] = found
        if low_bits & 15:  # the kernel was compiled for multiples of 16
            return False
        enter(values)
        return True

    return direct


def _layout(launch: Launch, compiled: Any, tensors: Sequence[Any]) -> tuple[Any, ...]:
    """The launcher's arguments with gaps, and what goes where."""
    order = {name: i for i, name in enumerate(launch.tensors)}
    descriptors = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    template: list[Any] = []
    addresses: list[Any] = []
    tuples: list[Any] = []
    boxes: list[Any] = []
    for name in launch.kernel.arg_names:
        place, i = len(template), order.get(name)
        if i is None:
            template.append(launch.constants[name])
            continue
        box, tensor = launch.boxes.get(name), tensors[i]
        template.append(None)
        if tensor is None:
            continue
        if box is not None:
            meta: Any = next(descriptors, None)  # none: a kind of descriptor that is not known
            if meta["fp4_padded"]:
                raise ValueError("a descriptor of fp4")
            sides, strides = [box.height, box.width], [box.stride, 1]
            before = meta["swizzle"], meta["elem_size"], _host_type(meta["elem_type"])
            boxes.append((place, i, before, (meta["block_size"], sides, strides, 0), {}))
            template += [*sides, *strides]
        elif isinstance(tensor, tuple):
            tuples.append((place, i))
        else:
            addresses.append((place, i))
    return template, addresses, tuples, boxes


def _host_type(kind: int) -> int:
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    return TMA_DTYPE_DEVICE_TO_HOST[kind]


def _launcher_of(run: Any) -> Any:
    """The C function of Triton 3.6, which hides in a closure where there are descriptors."""
    launch = run.launch
    names = getattr(getattr(launch, "__code__", None), "co_freevars", ())
    return launch.__closure__[names.index("launcher")].cell_contents if names else launch


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"kernels are launched Triton's own, slower way: {reason}", stacklevel=2)
