"""FedALT's layers in a model that transformers has loaded quantized."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import fedalt
from fedalt.model.states import BaseWeights
from fedalt_kernels import MixedLoRALinear, QuantizedWeight
from tests.kernels.budget import assert_within_budget

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STORAGES = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}


def dequantized(model: nn.Module) -> nn.Module:
    """A copy whose quantized layers are plain ones of the same weights."""
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        for name, child in module.named_children():
            if type(child).__name__ in ("Linear4bit", "Linear8bitLt"):
                weight = QuantizedWeight.of(child).dequantize(torch.float32)
                dense = nn.Linear(*reversed(weight.shape), bias=False, device=DEVICE)
                dense.weight.data = weight
                setattr(module, name, dense)
    return plain


@pytest.mark.parametrize("storage", STORAGES)
def test_a_quantized_model_is_adapted_as_it_is(storage: str, tiny_base: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        tiny_base,
        quantization_config=BitsAndBytesConfig(**STORAGES[storage]),
        device_map=DEVICE,
        dtype=torch.float32,
    )
    ids = torch.arange(12, device=DEVICE).view(1, -1)
    plain = dequantized(model)
    with torch.no_grad():
        eager = plain(ids).logits
        truth = plain.double()(ids).logits
    fedalt.inject(model, rank=2, alpha=4, dropout=0.0, target_modules=("all-linear",))
    layers = [module for module in model.modules() if isinstance(module, MixedLoRALinear)]
    assert [layer.weight.kind for layer in layers] == [storage] * 14
    logits = model(ids).logits
    assert_within_budget({"y": logits}, {"y": eager}, {"y": truth}, length=48)
    logits.sum().backward()
    assert all(layer.individual.b.grad.any() for layer in layers)
    with pytest.raises(fedalt.InputError, match="this method adds to base weights, but that of"):
        BaseWeights(model)
