"""A base model loaded with its frozen linear layers in few bits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from fedalt.config import ModelConfig
from fedalt.model.extras import bitsandbytes
from fedalt_kernels import Fp8Linear

_KINDS = ("Linear4bit", "Linear8bitLt", "Fp8Linear")


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer's weight is one that ``fedalt_kernels.QuantizedWeight`` reads."""
    return any(each.__name__ in _KINDS for each in type(module).__mro__)


def loading_options(config: ModelConfig, kept: Sequence[str] | None = None) -> dict[str, Any]:
    """What ``from_pretrained`` wants to hear of dtype and quantization.

    Args:
        config: of the base.
        kept: names of modules that stay as they are; None: the output head.

    Raises:
        InputError: bitsandbytes is wanted and not installed.
    """
    dtype = getattr(torch, config.dtype)
    if config.quantization not in ("nf4", "int8"):
        return {"dtype": dtype}
    bitsandbytes(f"model.quantization={config.quantization}")
    from transformers import BitsAndBytesConfig

    kinds = {
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        },
        "int8": {"load_in_8bit": True},
    }
    # The last one's name is from the days of int8 alone; it holds for both.
    quantization = BitsAndBytesConfig(**kinds[config.quantization], llm_int8_skip_modules=kept)
    # It quantizes on the device, as it reads: the whole never lies there in its own dtype.
    return {
        "dtype": dtype,
        "quantization_config": quantization,
        "device_map": {"": config.device},
    }


def finish_loading(model: Any, kept: Collection[str], config: ModelConfig) -> None:
    """Puts a loaded model on its device, in fp8 all linear layers but ``kept`` if wanted."""
    if config.quantization in ("nf4", "int8"):
        for module in model.modules():
            # Else they are packed anew when first evaluated on a CPU: then all that follows would
            # have other bits than a resumed run's.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return
    if config.quantization == "fp8":
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name not in kept:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, Fp8Linear.from_linear(module))
    model.to(config.device)
