"""What `mixed_lora_linear` accepts; every refusal names the argument, what came, what is wanted.

The checks run once for every kind of call (`kinds.find`), but for those of values.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .adapter import Adapter
from .dropout import SEED_LIMIT
from .quantized import KINDS, QuantizedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IMPLEMENTATIONS = ("auto", "torch", "triton", "reference")
SCHEDULES = ("decode", "recompute", "overlapped", "split", "expand")
HOPPER = "hopper"  # the schedule of sm_90's own kernels
MOST_ADAPTERS = 8
PLAIN = ("FalconLinear",)  # of nn.Linear, with another forward that computes the same


def check_tensors(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> None:
    """Raises TypeError for what has no dtype and no device to speak of."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if not isinstance(weight, Tensor | QuantizedWeight):
        raise TypeError(
            f"weight must be a Tensor or a QuantizedWeight, got {type(weight).__name__}"
        )
    if not (bias is None or isinstance(bias, Tensor)):
        raise TypeError(f"bias must be a Tensor, got {type(bias).__name__}")


def check_arguments(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    mixer: Tensor | tuple[float, ...] | None,
    scaling: float,
    dropout_p: float,
    impl: str,
    schedule: str | None,
) -> None:
    """Raises TypeError, ValueError or RuntimeError where an argument does not fit."""
    dtype, device = x.dtype, x.device
    if dtype not in DTYPES:
        raise ValueError(f"x must be float32, bfloat16, float16 or float64, got {dtype}")
    if len(weight.shape) != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be [..., K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}"
        )
    n, k = weight.shape
    if isinstance(weight, Tensor):
        _check_base("weight", weight, dtype, device)
    else:
        check_quantized(weight, device)
    if bias is not None:
        if bias.shape != (n,):
            raise ValueError(f"bias must be [{n}], got {list(bias.shape)}")
        _check_base("bias", bias, dtype, device)
    count = len(adapters)
    if not 1 <= count <= MOST_ADAPTERS:
        raise ValueError(f"adapters must be 1 to {MOST_ADAPTERS}, got {count}")
    for e, adapter in enumerate(adapters):
        if not isinstance(adapter, tuple):
            raise TypeError(f"adapters[{e}] must be an Adapter(a, b), got {type(adapter).__name__}")
        a, b = adapter
        rank = a.shape[0] if a.dim() == 2 else 0
        if rank < 1 or a.shape[1] != k or b.shape != (n, rank):
            raise ValueError(
                f"adapters[{e}] must be a [r, {k}] and b [{n}, r] with r >= 1, "
                f"got {list(a.shape)} and {list(b.shape)}"
            )
        _check_trained(f"adapters[{e}].a", a, dtype, device)
        _check_trained(f"adapters[{e}].b", b, dtype, device)
    if isinstance(mixer, Tensor):
        if mixer.shape != (count, k):
            raise ValueError(f"mixer must be [{count}, {k}], got {list(mixer.shape)}")
        _check_trained("mixer", mixer, dtype, device)
    elif mixer is not None:
        if not isinstance(mixer, tuple):
            raise TypeError(
                f"mixer must be a Tensor, a tuple of floats or None, got {type(mixer).__name__}"
            )
        if len(mixer) != count or not all(-math.inf < gate < math.inf for gate in mixer):
            raise ValueError(f"mixer must be {count} finite floats, got {mixer}")
    if not -math.inf < scaling < math.inf:
        raise ValueError(f"scaling must be finite, got {scaling}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if schedule is not None and (impl != "triton" or schedule not in (*SCHEDULES, HOPPER)):
        raise ValueError(
            f"schedule must be one of {', '.join((*SCHEDULES, HOPPER))}, and comes with "
            f"impl='triton', got {schedule!r} with {impl!r}"
        )


def stores_transposed(base: Any) -> bool:
    """Whether a linear layer's weight is stored as [K, N].

    Raises:
        TypeError: it is of another kind, or computes anything but x Wᵀ + b with a weight of its
            own: then that is not what a mixed layer in its place would compute.
    """
    kind = type(base)
    conv1d = kind.__name__ == "Conv1D" and hasattr(base, "nf")
    if not (conv1d or isinstance(base, nn.Linear)):
        raise TypeError(
            "base must be an nn.Linear or a Conv1D, a bitsandbytes Linear4bit or Linear8bitLt, "
            f"or an Fp8Linear, got {kind.__name__}"
        )
    if isinstance(base, NonDynamicallyQuantizableLinear):
        raise TypeError(
            "base is the out_proj of an nn.MultiheadAttention, which reads its weight and never "
            "calls it: an adapter would never run; leave it out, or use an attention that calls it"
        )
    weight = base._parameters.get("weight")
    if weight is None:
        raise TypeError(
            "base.weight is computed at every call (weight norm, pruning or another "
            "parametrization); make it permanent first, as remove_parametrizations does"
        )
    if isinstance(weight, nn.UninitializedParameter):
        raise TypeError("base.weight has no shape yet; call the model once first")
    if not weight.dtype.is_floating_point:
        raise TypeError(f"base.weight must be floating point, got {weight.dtype}")
    if base._forward_hooks or base._forward_pre_hooks:
        raise TypeError("base has forward hooks, which would never run; remove them first")
    own = isinstance(base, nn.Linear) and kind.forward is not nn.Linear.forward
    own = own and kind.__name__ not in PLAIN
    # accelerate's forward, which it puts on the layer itself, moves x and computes the same
    if own or ("forward" in vars(base) and not hasattr(base, "_hf_hook")):
        raise TypeError(
            f"base is a {kind.__name__}, whose forward is its own and may compute more than "
            "x Wᵀ + b; adapt plain nn.Linear layers"
        )
    return conv1d


def check_quantized(weight: QuantizedWeight, device: torch.device) -> None:
    """Raises ValueError where the packed tensors are not those of `QuantizedWeight`'s docstring."""
    kind, _, tensors, blocks = weight
    if kind not in KINDS:
        raise ValueError(f"weight.kind must be one of {', '.join(KINDS)}, got {kind!r}")
    four_bits = kind in ("nf4", "fp4")
    if len(blocks) not in ((1, 2) if four_bits else (0,)):
        form = "(block,) or (block, nested_block)" if four_bits else "()"
        raise ValueError(f"weight.blocks must be {form} for {kind}, got {blocks}")
    if any(block < 2 or block & (block - 1) for block in blocks):
        raise ValueError(f"weight.blocks must be powers of two from 2 on, got {blocks}")
    wanted = _packed(weight)
    if len(tensors) != len(wanted):
        raise ValueError(f"weight.tensors must be {len(wanted)} for {kind}, got {len(tensors)}")
    for i, (tensor, (dtype, shape)) in enumerate(zip(tensors, wanted, strict=True)):
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"weight.tensors[{i}] must be contiguous {list(shape)} for {kind}, "
                f"got {list(tensor.shape)}"
            )
        _check_base(f"weight.tensors[{i}]", tensor, dtype, device, whose=kind)


def _packed(weight: QuantizedWeight) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape of each packed tensor."""
    single, (n, k), blocks = torch.float32, weight.shape, weight.blocks
    if not blocks:
        data = torch.int8 if weight.kind == "int8" else torch.float8_e4m3fn
        return [(data, (n, k)), (single, (n,))]
    count = -(-n * k // blocks[0])
    octets, code = (torch.uint8, (-(-n * k // 2),)), (single, (16,))
    if len(blocks) == 1:
        return [octets, (single, (count,)), code]
    nested = [(single, (-(-count // blocks[1]),)), (single, (256,)), (single, ())]
    return [octets, (torch.uint8, (count,)), code, *nested]


def _check_base(
    name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device, whose: str = "x"
) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must have {whose}'s dtype {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on x's device {device}, got {tensor.device}")
    if tensor.requires_grad:
        raise ValueError(f"{name} must be frozen, got requires_grad=True")


def _check_trained(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype != dtype and tensor.dtype != torch.float32:
        raise ValueError(f"{name} must be {dtype} or torch.float32, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on x's device {device}, got {tensor.device}")


def check_seed(seed: Tensor | int) -> None:
    """Raises TypeError or ValueError for what is no seed."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise ValueError(
                f"seed must be an int64 tensor of shape [], got {seed.dtype} {list(seed.shape)}"
            )
    elif not isinstance(seed, int):
        raise TypeError(f"seed must be an int, a Tensor or None, got {type(seed).__name__}")
    elif not 0 <= seed < SEED_LIMIT:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}")
