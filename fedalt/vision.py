"""The base model of image clients: any image classifier of Hugging Face, and its processor."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from fedalt.config import BUILTIN_VIT
from fedalt.errors import InputError, first_line

HEAD_SEED = 0


def load_image_base(
    path: str, dtype: str, device: str, classes: Sequence[str], trained: Sequence[str] = ()
) -> tuple[nn.Module, Any]:
    """A frozen image classifier in evaluation mode, and its image processor.

    The checkpoint's head stays where it knows all of ``classes``; otherwise the model gets a new
    one, a row for each of ``sorted(classes)``, which is random but the same on every client.
    ``model.config.label2id`` says which row is whose.

    Args:
        path: a Hugging Face model id or folder, or ``builtin-vit``.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: such as ``cpu`` or ``cuda``.
        classes: every class name of the federation.
        trained: modules that clients train whole; a new head must be among them.

    Raises:
        InputError: no such model or device, the checkpoint is no image classifier, or nobody would
            train its new head.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    # From its own module: where torchvision is missing, transformers 5.17 hides the public name.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    folder = str(Path(__file__).parent / "assets" / "vit") if path == BUILTIN_VIT else path
    try:
        target = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"model.device: {device!r} cannot be used: {first_line(error)}") from None
    try:
        # Pillow's backend, so that pixels do not depend on whether torchvision is installed.
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        config = AutoConfig.from_pretrained(folder)
        new_head = not set(classes) <= set(config.label2id or {})
        if new_head:
            names = sorted(set(classes))
            config.id2label = dict(enumerate(names))
            config.label2id = {name: row for row, name in enumerate(names)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(HEAD_SEED)
            model: Any = AutoModelForImageClassification.from_pretrained(
                folder,
                config=config,
                dtype=getattr(torch, dtype),
                ignore_mismatched_sizes=new_head,
            )
            untrained = _start_head(model) - set(trained) if new_head else set()
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = first_line(error)
        raise InputError(f"model.path: cannot load {path!r}: {reason}") from None
    if untrained:
        cure = f"train a new one with lora.modules_to_save=[{', '.join(sorted(untrained))}]"
        raise InputError(f"model.path: the head of {path!r} does not know the classes; {cure}")
    model.to(target)
    return model.requires_grad_(False).eval(), processor


@torch.no_grad()
def _start_head(model: Any) -> set[str]:
    """Fresh weights for the head, also where the checkpoint's had the same shape; its modules."""
    names = _head_names(model)
    for name in names:
        tensor = model.get_parameter(name)
        if tensor.dim() < 2:
            tensor.zero_()
        else:
            tensor.normal_(std=getattr(model.config, "initializer_range", 0.02))
    return {name.rpartition(".")[0] for name in names}


def _head_names(model: Any) -> list[str]:
    """The parameters whose shape depends on the number of classes, whatever they are called."""
    config = copy.deepcopy(model.config)
    config.num_labels += 1
    with torch.device("meta"):
        larger = type(model)(config)
    shapes = {name: tensor.shape for name, tensor in larger.named_parameters()}
    return [name for name, tensor in model.named_parameters() if tensor.shape != shapes[name]]
