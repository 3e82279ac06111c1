"""What the layer keeps for its backward."""

import pytest
import torch

from fedalt_kernels import mixed_lora_linear

from .cases import Case, apply, build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("ranks", "gate"), [((8, 8), "softmax"), ((2, 5), "fixed")])
def test_saved_bytes_are_as_documented(
    ranks: tuple[int, ...], gate: str, dropout: float, dtype: torch.dtype
) -> None:
    case = Case(m=64, n=48, k=32, ranks=ranks, gate=gate, dtype=dtype, param_dtype=torch.float32)
    inputs = build(case)
    known = {
        tensor.untyped_storage().data_ptr()
        for tensor in [*inputs.tensors().values(), inputs.weight, inputs.bias]
    }
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = apply(mixed_lora_linear, inputs, dropout, seed=None)
    gates = 4 * len(ranks) if gate == "softmax" else 0
    seed = 8 if dropout else 0
    assert sum(saved.values()) == case.m * (dtype.itemsize * sum(ranks) + gates) + seed
    y.backward(inputs.dy)
