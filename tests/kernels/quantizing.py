"""Quantizers in plain PyTorch, and what their storage stands for, element by element."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fedalt_kernels import Fp8Linear, QuantizedWeight
from fedalt_kernels.reference import reference

from .budget import assert_within_budget
from .cases import Case, Inputs, apply, build, run
from .parity import pool

STORAGES = ("nf4", "nested nf4", "int8", "fp8")


def normal_code() -> Tensor:
    """The 16 values of NF4: quantiles of the normal distribution, eight of them positive."""
    edge = 0.9677083
    upper = torch.special.ndtri(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
    lower = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((upper, torch.zeros(1, dtype=torch.float64), lower)).sort().values
    return (values / values.max()).float()


def quantize(
    weight: Tensor, storage: str, block: int = 16, nested_block: int = 4
) -> QuantizedWeight:
    """A weight [N, K] in one of the storages; small blocks, so that small matrices have many."""
    n, k = weight.shape
    wide = weight.float()
    if storage == "fp8":
        linear = torch.nn.Linear(k, n, bias=False, device=weight.device)
        linear.weight.data = wide
        return QuantizedWeight.of(Fp8Linear.from_linear(linear))
    if storage == "int8":
        scale = wide.abs().amax(1)
        data = (wide * (127 / scale.unsqueeze(1))).round().to(torch.int8)
        return QuantizedWeight("int8", (n, k), (data, scale))
    code = normal_code().to(weight.device)
    nibbles, absmax = _in_blocks(wide.flatten(), code, block)
    nibbles = torch.cat((nibbles, nibbles.new_zeros(nibbles.numel() % 2)))
    octets = nibbles[::2] << 4 | nibbles[1::2]
    if storage == "nf4":
        return QuantizedWeight("nf4", (n, k), (octets, absmax, code), (block,))
    offset = absmax.mean()
    nested_code = torch.linspace(-1, 1, 256, device=weight.device)
    octets_of_absmax, nested_absmax = _in_blocks(absmax - offset, nested_code, nested_block)
    tensors = (octets, octets_of_absmax, code, nested_absmax, nested_code, offset)
    return QuantizedWeight("nf4", (n, k), tensors, (block, nested_block))


def _in_blocks(values: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The nearest code of each value over its block's largest, and these."""
    padded = torch.cat((values, values.new_zeros(-values.numel() % block))).view(-1, block)
    absmax = padded.abs().amax(1)
    shares = (padded / absmax.unsqueeze(1)).flatten()[: values.numel()]
    return (shares.unsqueeze(1) - code).abs().argmin(1).to(torch.uint8), absmax


def exact(weight: QuantizedWeight) -> Tensor:
    """W [N, K] in float64, by the definition of its storage."""
    n, k = weight.shape
    data, *statistics = weight.tensors
    if not weight.blocks:
        values = data.double() * statistics[0].double().unsqueeze(1)
        return values / 127 if weight.kind == "int8" else values
    i = torch.arange(n * k, device=data.device)
    nibbles = torch.where(i % 2 == 0, data[i // 2] >> 4, data[i // 2] & 15)
    absmax, code, *nested = statistics
    if nested:
        nested_absmax, nested_code, offset = (each.double() for each in nested)
        j = torch.arange(absmax.numel(), device=data.device)
        absmax = nested_code[absmax.long()] * nested_absmax[j // weight.blocks[1]] + offset
    values = code.double()[nibbles.long()] * absmax.double()[i // weight.blocks[0]]
    return values.view(n, k)


def triple(inputs: Inputs, storage: str, block: int = 16) -> tuple[Inputs, Inputs, Inputs]:
    """The inputs with their weight quantized; dequantized beforehand; the latter in float64."""
    weight = quantize(inputs.weight, storage, block)
    dense = exact(weight)
    return (
        replace(inputs, weight=weight),
        replace(inputs, weight=dense.to(inputs.x.dtype)),
        replace(inputs.in_float64(), weight=dense),
    )


def check(
    case: Case,
    storage: str,
    function: Callable[..., Tensor],
    draws: int,
    block: int = 16,
    device: str = "cpu",
    gradients: bool = True,
) -> None:
    """As `parity.check`, where eager PyTorch is given the dequantized weight."""

    def results(function: Callable[..., Tensor], inputs: Inputs) -> dict[str, Tensor]:
        if gradients:
            return run(function, inputs, case.dropout)
        with torch.no_grad():
            return {"y": apply(function, inputs, case.dropout)}

    inputs = [triple(build(case, seed, device), storage, block) for seed in range(draws)]
    got = pool([results(function, quantized) for quantized, _, _ in inputs])
    eager = pool([results(reference, dense) for _, dense, _ in inputs])
    truth = pool([results(reference, wide) for _, _, wide in inputs])
    assert_within_budget(got, eager, truth, length=max(case.m, case.n, case.k))
