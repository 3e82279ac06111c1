"""Which implementation serves a call: what was asked for, or what runs best where x lies."""

import importlib.util
import warnings
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .quantized import QuantizedWeight

OLDEST_CAPABILITY = (8, 0)
OLDEST_FP8_CAPABILITY = (8, 9)


def plain(x: Tensor) -> bool:
    """Whether PyTorch's own operations alone serve x: on the meta device, under transforms of
    torch.func, and for forward-mode derivatives.
    """
    transformed = torch._C._are_functorch_transforms_active()
    return x.device.type == "meta" or transformed or forward_ad._current_level >= 0


def implementation(impl: str, x: Tensor, weight: Tensor | QuantizedWeight) -> str:
    """What serves a call: "torch", "triton" or "reference".

    "auto" is "triton" on a GPU that runs it, and "torch" on a CPU; on a GPU that does not, it is
    "torch" with one warning that says why.  Where x is `plain`, all are "reference".

    Raises:
        RuntimeError: `impl` is "triton" and it cannot run here; or, whatever `impl` is, the weight
            is fp8 and the GPU is older than capability 8.9.
    """
    fp8 = isinstance(weight, QuantizedWeight) and weight.kind == "fp8"
    if fp8 and (reason := _without_fp8(x.device)):
        raise RuntimeError(f"an fp8 weight cannot be used here: {reason}")
    if plain(x):
        return "reference"
    if impl in ("torch", "reference") or (impl == "auto" and x.device.type == "cpu"):
        return "torch" if impl == "auto" else impl
    reason = _unsupported(x.device, x.dtype)
    if reason is None and isinstance(weight, Tensor) and 1 not in weight.stride():
        reason = f"one of weight's strides must be 1, got {weight.stride()}"
    if reason is None:
        return "torch" if x.numel() == 0 else "triton"
    if impl == "triton":
        raise RuntimeError(f"impl='triton' cannot run: {reason}; use impl='torch' or 'auto'")
    _warn_once(reason)
    return "torch"


def _unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot serve a device and dtype; None if they can."""
    if dtype == torch.float64:
        return "the kernels compute float32, bfloat16 and float16, got float64"
    if not _has_triton():
        return "triton is not installed (pip install 'fedalt[triton]')"
    if device.type == "cpu":
        from triton import knobs

        if knobs.runtime.interpret:
            return None
        return "x is on a CPU (TRITON_INTERPRET=1 runs the kernels there, very slowly)"
    if device.type != "cuda":
        return f"x must be on a CUDA or ROCm device, got {device}"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return f"the GPU must have compute capability 8.0 or more, got {capability}"
    from .triton import workspace

    workspace.prepare(device)
    return None


def _without_fp8(device: torch.device) -> str | None:
    """Why a device cannot compute with fp8; None if it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_FP8_CAPABILITY:
        return None
    return f"the GPU must have compute capability 8.9 or more, got {capability}"


@cache
def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a blocked module
        return False


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"impl='auto' uses PyTorch products instead of Triton: {reason}", stacklevel=4)


# As torch.compiler.assume_constant_result does, which would import the whole compiler.
_unsupported._dynamo_marked_constant = True  # type: ignore[attr-defined]
_without_fp8._dynamo_marked_constant = True  # type: ignore[attr-defined]
_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]
