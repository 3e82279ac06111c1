"""The base model of image clients: any image classifier of Hugging Face, and its processor."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from fedalt.config import ModelConfig
from fedalt.errors import InputError, first_line
from fedalt.model.base import checkpoint_of, usable_device
from fedalt.model.quantized import finish_loading, loading_options

HEAD_SEED = 0


def load_image_base(
    config: ModelConfig, classes: Sequence[str], trained: Sequence[str] = ()
) -> tuple[nn.Module, Any]:
    """A frozen image classifier in evaluation mode, and its image processor.

    The checkpoint's head stays where it knows all of ``classes``; otherwise the model gets a new
    one, a row for each of ``sorted(classes)``, which is random but the same on every client.
    ``model.config.label2id`` says which row is whose.

    Args:
        config: which model, and how it is loaded.
        classes: every class name of the federation.
        trained: modules that clients train whole; a new head must be among them.

    Raises:
        InputError: no such model or device, the checkpoint is no image classifier, nobody would
            train its new head, or a package is missing that its quantization wants.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    # From its own module: where torchvision is missing, transformers 5.17 hides the public name.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    path, folder = config.path, checkpoint_of(config.path)
    usable_device(config.device)
    try:
        # Pillow's backend, so that pixels do not depend on whether torchvision is installed.
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        made = AutoConfig.from_pretrained(folder)
        new_head, head = fit_head(made, path, classes, trained)
        modules = {name.rpartition(".")[0] for name in head}
        options = loading_options(config, sorted(modules))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(HEAD_SEED)
            model: Any = AutoModelForImageClassification.from_pretrained(
                folder,
                config=made,
                ignore_mismatched_sizes=new_head,
                **options,
            )
            if new_head:
                _start_head(model, head)
    except InputError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = first_line(error)
        raise InputError(f"model.path: cannot load {path!r}: {reason}") from None
    finish_loading(model, modules, config)
    return model.requires_grad_(False).eval(), processor


def fit_head(
    config: Any, path: str, classes: Sequence[str], trained: Sequence[str]
) -> tuple[bool, dict[str, torch.Size]]:
    """Give a checkpoint's configuration a row for each class, unless it knows them all.

    Args:
        config: of the checkpoint, changed in place; ``path``: what it is called.
        classes, trained: as in ``load_image_base``.

    Returns:
        Whether the head is a new one, and by name the shapes of all that the head consists of.

    Raises:
        InputError: nobody would train the new head.
    """
    new_head = not set(classes) <= set(config.label2id or {})
    if new_head:
        names = sorted(set(classes))
        config.id2label = dict(enumerate(names))
        config.label2id = {name: row for row, name in enumerate(names)}
    shapes = _head_shapes(config)
    untrained = {name.rpartition(".")[0] for name in shapes} - set(trained)
    if new_head and untrained:
        cure = f"train a new one with lora.modules_to_save=[{', '.join(sorted(untrained))}]"
        raise InputError(f"model.path: the head of {path!r} does not know the classes; {cure}")
    return new_head, shapes


def _start_head(model: Any, shapes: Mapping[str, torch.Size]) -> None:
    """Fresh weights for the head, also where the checkpoint's had the same shape.

    They are drawn on the host, so that they depend neither on the device nor on the loading. The
    shapes are told, since transformers 5.17 keeps the checkpoint's in a quantized model.
    """
    generator = torch.Generator().manual_seed(HEAD_SEED)
    std = getattr(model.config, "initializer_range", 0.02)
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        first = torch.zeros(shape)
        if len(shape) > 1:
            first.normal_(std=std, generator=generator)
        like = model.get_parameter(name)
        setattr(model.get_submodule(module), leaf, nn.Parameter(first.to(like.device, like.dtype)))


def _head_shapes(config: Any) -> dict[str, torch.Size]:
    """By name, the shapes that depend on the number of classes, whatever the head is called."""
    from transformers import AutoModelForImageClassification

    more = copy.deepcopy(config)
    more.num_labels += 1
    with torch.device("meta"):
        make = AutoModelForImageClassification.from_config
        model, larger = make(config), make(more)
    shapes = {name: tensor.shape for name, tensor in larger.named_parameters()}
    named = model.named_parameters()
    return {name: tensor.shape for name, tensor in named if tensor.shape != shapes[name]}
