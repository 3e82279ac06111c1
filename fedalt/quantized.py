"""Frozen base weights in few bits: by bitsandbytes as they are loaded, or by our own layer after."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedalt.config import ModelConfig
from fedalt.extras import bitsandbytes


def loading_options(config: ModelConfig) -> dict[str, Any]:
    """What ``from_pretrained`` wants to hear of dtype and quantization.

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
    quantization = BitsAndBytesConfig(**kinds[config.quantization])
    # It quantizes on the device, as it reads: the whole never lies there in its own dtype.
    return {
        "dtype": dtype,
        "quantization_config": quantization,
        "device_map": {"": config.device},
    }


def finish_loading(model: nn.Module, head: nn.Module | None, config: ModelConfig) -> nn.Module:
    """Puts a loaded model on its device, with its linear layers but ``head`` in fp8 if wanted."""
    if config.quantization in ("nf4", "int8"):
        return model
    if config.quantization == "fp8":
        from fedalt_kernels import Fp8Linear

        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and module is not head:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, Fp8Linear.from_linear(module))
    return model.to(config.device)
