"""Frozen base weights in the storage they were quantized to, and how they become numbers.

Blocks of 4 bits, ``"nf4"`` and ``"fp4"``, with i = n K + k::

    W[n, k] = code[q_i] absmax[i // block],    q_i = byte i // 2, its high nibble first
    absmax[j] = nested_code[a_j] nested_absmax[j // nested_block] + offset    where it is nested

Rows of 8 bits::

    "int8"  W[n, k] = data[n, k] scale[n] / 127        "fp8"  W[n, k] = data[n, k] scale[n]

The first three are bitsandbytes' own storage, taken as it lies in its layers; "fp8" is that of
`fp8.Fp8Linear`.  W is computed in float32 (float64 for float64) and then rounded to the dtype asked
for, once; a kernel that never writes W may leave that rounding out.
"""

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

KINDS = ("nf4", "fp4", "int8", "fp8")
INT8_RANGE = 127
# 1 MiB of float32: larger pieces leave the cache, smaller ones cost calls.
PIECE_ELEMENTS = 2**18


class _Held(threading.local):
    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Tensor] = {}


_held = _Held()


class QuantizedWeight(NamedTuple):
    """A frozen weight [N, K], packed; `of` takes it from a layer, without a copy.

    ``tensors`` are, for 4 bits: the bytes, uint8 [⌈N K / 2⌉]; absmax, float32 [⌈N K / block⌉]; the
    code, float32 [16].  Nested: absmax is uint8, and three follow, all float32: nested_absmax
    [⌈blocks / nested_block⌉], nested_code [256] and the offset [].  For 8 bits: the data, int8 or
    float8_e4m3fn [N, K], and the scale of each row, float32 [N].
    """

    kind: str  # of KINDS
    shape: tuple[int, int]  # N, K
    tensors: tuple[Tensor, ...]
    blocks: tuple[int, ...] = ()  # elements that share a statistic: (block,), (block, nested_block)

    @classmethod
    def of(cls, module: Any) -> "QuantizedWeight":
        """The weight of a bitsandbytes Linear4bit or Linear8bitLt, or of an `Fp8Linear`.

        Raises:
            TypeError: the module is of another kind, or has not been quantized yet.
            ValueError: bitsandbytes has repacked the weight for its own products on a CPU.
        """
        read = _READERS.get(storage_of(module))
        if read is None:
            raise TypeError(
                "module must be a bitsandbytes Linear4bit or Linear8bitLt, or an Fp8Linear, "
                f"got {type(module).__name__}"
            )
        return read(module)

    @property
    def device(self) -> torch.device:
        """Where the packed tensors lie."""
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all packed tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """W [N, K] in a floating-point dtype, in a contiguous `out` [N, K] of it if given."""
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        fill = _fill_from_blocks if self.blocks else _fill_from_rows
        fill(self, out, wide)
        return out

    def _absmax(self, wide: torch.dtype) -> Tensor:
        """The largest absolute value of each block, [⌈N K / block⌉], of 4 bits."""
        if len(self.blocks) == 1:
            return self.tensors[1].to(wide)
        _, octets, _, *statistics = self.tensors
        nested_absmax, nested_code, offset = (each.to(wide) for each in statistics)
        spread = nested_absmax.repeat_interleave(self.blocks[1])[: octets.numel()]
        return nested_code.index_select(0, octets.int()).mul_(spread).add_(offset)


def dense(weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """A weight as a matrix [N, K]: itself, or dequantized into memory that the next call reuses."""
    if isinstance(weight, Tensor):
        return weight
    return weight.dequantize(dtype, workspace(weight, dtype))


def workspace(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Memory [N, K] that all layers share, one after another.

    On a CPU each thread holds as much as its largest weight needs, since fresh pages cost as much
    as filling them.  A GPU's allocator does that itself, in the order of each stream, and knows
    of CUDA graphs.
    """
    n, k = weight.shape
    # A mode such as FakeTensorMode makes memory of its own, which must not outlive it.
    if weight.device.type != "cpu" or torch._C._len_torch_dispatch_stack():
        return torch.empty(n, k, dtype=dtype, device=weight.device)
    held = _held.by_dtype.get(dtype)
    if held is None or held.numel() < n * k:
        with torch.inference_mode(False):  # or it could not be written to outside of that mode
            held = _held.by_dtype[dtype] = torch.empty(n * k, dtype=dtype)
    return held[: n * k].view(n, k)


def storage_of(module: Any) -> str:
    """The class that says how a module stores its weight, by name: bitsandbytes may be missing."""
    return next((each.__name__ for each in type(module).__mro__ if each.__name__ in _READERS), "")


def _from_4bit(module: Any) -> QuantizedWeight:
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        state = module.quant_state  # wrappers that rebuild parameters lose the weight's own
    if state is None:
        raise _not_quantized(module)
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes has repacked this weight for its own products on a CPU; load it again, "
            "and wrap it before its first forward in eval mode"
        )
    with torch._C.DisableTorchFunctionSubclass():  # else these would be half-made Params4bit
        octets = weight.detach().view(torch.uint8).reshape(-1)
    tensors, blocks = [octets, state.absmax, state.code], [state.blocksize]
    if state.state2 is not None:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
        blocks.append(state.state2.blocksize)
    n, k = state.shape
    return QuantizedWeight(state.quant_type, (n, k), tuple(tensors), tuple(blocks))


def _from_8bit(module: Any) -> QuantizedWeight:
    if module.state.has_fp16_weights:
        raise TypeError("this Linear8bitLt keeps 16 bits: make it with has_fp16_weights=False")
    weight = module.weight
    scale = getattr(weight, "SCB", None)  # bitsandbytes moves it at the first forward
    if scale is None:
        scale = module.state.SCB
    if scale is None or weight.dtype != torch.int8:
        raise _not_quantized(module)
    n, k = weight.shape
    return QuantizedWeight("int8", (n, k), (weight.detach(), scale))


def _from_fp8(module: Any) -> QuantizedWeight:
    n, k = module.weight.shape
    return QuantizedWeight("fp8", (n, k), (module.weight.detach(), module.scale))


def _not_quantized(module: Any) -> TypeError:
    name = type(module).__name__
    return TypeError(f"this {name} is not quantized yet: move it to its device with .to(device)")


_READERS = {"Linear4bit": _from_4bit, "Linear8bitLt": _from_8bit, "Fp8Linear": _from_fp8}


def _fill_from_blocks(weight: QuantizedWeight, out: Tensor, wide: torch.dtype) -> None:
    octets, code, block = weight.tensors[0], weight.tensors[2].to(wide), weight.blocks[0]
    # Both values of every byte, as one number that is looked up at once.
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), 1)
    table = torch.view_as_complex(pairs)
    absmax = weight._absmax(wide)
    flat = out.view(-1)
    step = max(1, PIECE_ELEMENTS // block)
    for first in range(0, absmax.numel(), step):
        start, stop = first * block, min((first + step) * block, flat.numel())
        found = table.index_select(0, octets[start // 2 : (stop + 1) // 2].int())
        values = torch.view_as_real(found).view(-1)[: stop - start]
        scale = absmax[first : first + step]
        if values.numel() % block:
            scale = scale.repeat_interleave(block)[: values.numel()]
        else:
            values, scale = values.view(-1, block), scale.unsqueeze(1)
        torch.mul(values, scale, out=flat[start:stop].view(values.shape))


def _fill_from_rows(weight: QuantizedWeight, out: Tensor, wide: torch.dtype) -> None:
    data, scale = weight.tensors
    n, k = weight.shape
    scale = scale.to(wide).unsqueeze(1)
    # As a tensor: by a number, PyTorch multiplies with its rounded inverse on a GPU.
    divisor = scale.new_full((), INT8_RANGE)
    step = max(1, PIECE_ELEMENTS // k)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        values = data[rows].to(wide).mul_(scale[rows])
        out[rows] = values.div_(divisor) if weight.kind == "int8" else values
