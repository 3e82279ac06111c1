"""The model of a run without its weights: from its configuration alone, in fake tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fedalt.config import Config
from fedalt.errors import InputError, first_line
from fedalt.model import checkpoint_of, fit_head, fit_tokenizer, gguf_options, load_tokenizer


def load_skeleton(config: Config, classes: Sequence[str]) -> tuple[nn.Module, Any]:
    """The frozen base on the meta device, and its tokenizer or image processor.

    Args:
        config: of the run; of the model's files only its configuration and its tokenizer's or
            processor's are read.
        classes: of images, every class name; empty: those that the model knows.

    Raises:
        InputError: no such model, nobody would train its new head, or a tokenizer that has no end
            token or does not fit the model.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
    )
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    path = checkpoint_of(config.model.path)
    tool: Any
    kind: Any
    try:
        shape = AutoConfig.from_pretrained(path, **gguf_options(config.model.path))
        if config.data.kind == "image":
            kind = AutoModelForImageClassification
            tool = AutoImageProcessor.from_pretrained(path, backend="pil")
            fit_head(shape, config.model.path, classes, config.lora.modules_to_save)
        else:
            kind = AutoModelForCausalLM
            tool = load_tokenizer(path, config.model.path)
        with torch.device("meta"):
            model = kind.from_config(shape, dtype=getattr(torch, config.model.dtype))
    except InputError:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = first_line(error)
        raise InputError(f"model.path: cannot load {config.model.path!r}: {reason}") from None
    if getattr(shape, "quantization_config", None):
        raise InputError(
            f"model.path: {config.model.path!r} is quantized already; its memory is not told"
        )
    if config.data.kind == "text":
        fit_tokenizer(tool, model, config.model.path)
    return model.requires_grad_(False).eval(), tool


def give_storage(model: nn.Module, device: torch.device) -> None:
    """Move a model from the meta device to ``device``, under a ``FakeTensorMode``.

    Tensors that modules share stay shared.
    """
    moved: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    empty: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=False)
                    moved[id(tensor)] = empty
                tensors[name] = moved[id(tensor)]
