"""The base model: load it and put the mixed-LoRA layers in."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fedalt.config import BUILTIN_BASE, BUILTIN_VIT, ModelConfig
from fedalt.errors import InputError, first_line
from fedalt.model.logits import mark_chunkable
from fedalt.model.quantized import finish_loading, is_quantized, loading_options
from fedalt_kernels import MixedLoRALinear

ALL_LINEAR = "all-linear"
# Names under which layers of one module read the same input, in the order in which they are called.
READ_ONE_INPUT = [
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
]


def load_base(config: ModelConfig) -> tuple[nn.Module, Any]:
    """The frozen base model in evaluation mode and its tokenizer, padding on the left.

    Raises:
        InputError: no such model or device, or a package is missing that its quantization wants.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, options = checkpoint_of(config.path), loading_options(config)
    usable_device(config.device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = first_line(error)
        raise InputError(f"model.path: cannot load {config.path!r}: {reason}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    head = output_head(model)
    finish_loading(model, [name for name, m in model.named_modules() if m is head], config)
    model.requires_grad_(False).eval()
    mark_chunkable(model)
    return model, tokenizer


def checkpoint_of(path: str) -> str:
    """What ``from_pretrained`` takes: the package's own folder for the name of a built-in base."""
    own = {BUILTIN_BASE: "base", BUILTIN_VIT: "vit"}
    return str(Path(__file__).parents[1] / "assets" / own[path]) if path in own else path


def usable_device(name: str) -> torch.device:
    """The device of a setting; ``InputError`` where there is none."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"model.device: {name!r} cannot be used: {first_line(error)}") from None


def sum_dtype(device: torch.device) -> torch.dtype:
    """Of sums that stay on the device: float64, or float32 on an Apple GPU, which has no wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits of tokens or classes, where the model tells."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head or getattr(model, "classifier", None)


def inject(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 32,
    dropout: float = 0.05,
    target_modules: str | Sequence[str] = ("q_proj", "v_proj"),
    seed: int = 0,
    *,
    rest_of_world: bool = True,
    mixer: bool | str | tuple[float, ...] | None = True,
    modules_to_save: Sequence[str] = (),
    impl: str = "auto",
) -> nn.Module:
    """Freeze ``model`` and replace its targeted linear layers by ``MixedLoRALinear``, in place.

    Args:
        model: any model of ``nn.Linear`` or Conv1D layers.
        rank, alpha, dropout: of every adapter; the scale is ``alpha / rank``.
        target_modules: layer names as in PEFT: a full dotted name or its ending. ``all-linear``
            is every linear layer but the output head.
        seed: of the first A and mixer; equal seeds give equal starts whatever the device.
        rest_of_world: with the frozen second adapter; without it each layer is one plain LoRA.
        mixer, impl: as in ``MixedLoRALinear``.
        modules_to_save: names of modules that are trained whole beside the adapters, as in PEFT,
            such as a classifier's new head.

    Returns:
        The same model.

    Raises:
        InputError: a name that no linear layer of the model has, adapters are in already, or
            ``impl`` cannot run here.
    """
    names = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    if any(isinstance(module, MixedLoRALinear) for module in model.modules()):
        raise InputError("inject: the model has its adapters already; load a state instead")
    targets = [name for name in _target_names(model, names) if name not in modules_to_save]
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in targets:
        parent, _, leaf = name.rpartition(".")
        base = model.get_submodule(name)
        layer = MixedLoRALinear(
            base, rank, alpha, dropout, rest_of_world=rest_of_world, mixer=mixer, impl=impl
        )
        layer.reset_parameters(generator)
        layer.train(base.training)
        setattr(model.get_submodule(parent), leaf, layer)
    _train_whole(model, modules_to_save)
    _try_out(layer)
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in targets):
        _share_inputs(model.get_submodule(parent))
    return model


@torch.no_grad()
def _try_out(layer: MixedLoRALinear) -> None:
    """Refuses an implementation that cannot run, before anything is trained with it."""
    like = layer.weight if isinstance(layer.weight, Tensor) else layer.individual.a
    try:
        layer(like.new_zeros(1, layer.in_features))
    except RuntimeError as error:
        raise InputError(f"lora.impl: {error}") from None


def _train_whole(model: nn.Module, names: Sequence[str]) -> None:
    """Make the named modules part of every client's state, in a dtype wide enough to train."""
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            known = ", ".join(child for child, _ in model.named_children())
            raise InputError(f"lora.modules_to_save: no module is named {name!r}; known: {known}")
        if any(is_quantized(inner) for inner in modules[name].modules()):
            raise InputError(
                f"lora.modules_to_save: {name!r} is quantized; leave it out, or set "
                "model.quantization=none"
            )
        module = modules[name].requires_grad_(True)
        others = [p for n, m in modules.items() if m is not module for p in m.parameters(False)]
        if {id(p) for p in module.parameters(False)} & {id(p) for p in others}:
            raise InputError(
                f"lora.modules_to_save: {name!r} is tied to another module; leave it out"
            )
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters()):
            module.float().register_forward_pre_hook(_widen)
    model.fedalt_heads = tuple(names)  # type: ignore[assignment]


def _widen(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return arguments[0].float(), *arguments[1:]


def _share_inputs(module: nn.Module) -> None:
    """Let a module's adapted layers that read the same input share their pass over it."""
    for names in READ_ONE_INPUT:
        layers = [getattr(module, name, None) for name in names]
        adapted = [layer for layer in layers if isinstance(layer, MixedLoRALinear)]
        if len(adapted) > 1:
            MixedLoRALinear.share_input(adapted)


def _target_names(model: nn.Module, wanted: tuple[str, ...]) -> list[str]:
    """Dotted names of the layers to replace, in the model's order."""
    head = output_head(model)
    linear = {
        name: module
        for name, module in model.named_modules()
        if name and (_is_linear(module) or is_quantized(module))
    }
    body = [name for name, module in linear.items() if module is not head]
    if wanted == (ALL_LINEAR,):
        return body
    for target in wanted:
        if not any(_matches(name, target) for name in linear):
            leaves = sorted({name.rpartition(".")[2] for name in body})
            near = difflib.get_close_matches(target, leaves, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            known = ", ".join(leaves)
            raise InputError(
                f"lora.target_modules: no linear layer is named {target!r}; {hint}known: {known}"
            )
    return [name for name in linear if any(_matches(name, target) for target in wanted)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
