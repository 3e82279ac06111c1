"""The base model: load it and put the mixed-LoRA layers in."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fedalt.config import BUILTIN_BASE, BUILTIN_VIT, ModelConfig
from fedalt.errors import InputError, InputWarning, first_line
from fedalt.model.gguf import forget_quantization, gguf_options, is_gguf
from fedalt.model.logits import gather_rows, mark_chunkable, take_back
from fedalt.model.quantized import finish_loading, is_quantized, loading_options
from fedalt.model.targets import find_targets, is_all_linear, left_out
from fedalt.model.tokenizer import fit_tokenizer, load_tokenizer
from fedalt_kernels import MixedLoRALinear

# Names under which layers of one module read the same input, in the order in which they are called.
READ_ONE_INPUT = [
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
]


def load_base(config: ModelConfig) -> tuple[nn.Module, Any]:
    """The frozen base model in evaluation mode and its tokenizer, padding on the left.

    Raises:
        InputError: no such model or device, a package is missing that its quantization wants, or
            a tokenizer that has no end token or does not fit the model.
    """
    from transformers import AutoModelForCausalLM

    path = checkpoint_of(config.path)
    options = {**loading_options(config), **gguf_options(config.path)}
    usable_device(config.device)
    tokenizer = load_tokenizer(path, config.path)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = first_line(error)
        raise InputError(f"model.path: cannot load {config.path!r}: {reason}") from None
    if is_gguf(config.path):
        forget_quantization(model)
    fit_tokenizer(tokenizer, model, config.path)
    head = output_head(model)
    finish_loading(model, [name for name, m in model.named_modules() if m is head], config)
    model.requires_grad_(False).eval()
    mark_chunkable(model)
    gather_rows(head)
    return model, tokenizer


def checkpoint_of(path: str) -> str:
    """What ``from_pretrained`` takes: the package's own folder for the name of a built-in base, of
    a ``.gguf`` file its folder."""
    if is_gguf(path):
        return str(Path(path).parent)
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

    On the meta device adapters get no values either: after ``to_empty``, load a state, or draw one
    by each layer's ``reset_parameters``.

    Args:
        model: any model of ``nn.Linear`` or Conv1D layers.
        rank, alpha, dropout: of every adapter; the scale is ``alpha / rank``.
        target_modules: layer names as in PEFT. A list is of full dotted names or their endings; a
            text is a regular expression that matches a whole dotted name, or ``all-linear``: every
            linear layer but the output head. What that leaves out otherwise, such as experts kept
            as stacks of matrices, is told by an ``InputWarning``.
        seed: of the first A and mixer; equal seeds give equal starts whatever the device.
        rest_of_world: with the frozen second adapter; without it each layer is one plain LoRA.
        mixer, impl: as in ``MixedLoRALinear``.
        modules_to_save: names of modules that are trained whole beside the adapters, as in PEFT,
            such as a classifier's new head.

    Returns:
        The same model.

    Raises:
        InputError: a name or pattern that fits no linear layer of the model, a layer that computes
            more than ``W x + b`` or whose weight is read past its forward, adapters are in already
            (ours or PEFT's), or ``impl`` cannot run here.
    """
    _refuse_unready(model)
    targets = find_targets(model, target_modules, output_head(model), modules_to_save)
    model.requires_grad_(False)
    _train_whole(model, modules_to_save)
    everything = is_all_linear(target_modules)
    layers: dict[nn.Module, MixedLoRALinear] = {}
    unfit = []
    for base, (name, *_) in targets.items():
        take_back(base)
        try:
            layers[base] = MixedLoRALinear(
                base, rank, alpha, dropout, rest_of_world=rest_of_world, mixer=mixer, impl=impl
            )
        except TypeError as error:
            if not everything:
                raise InputError(f"lora.target_modules: {name}: {error}") from None
            unfit.append(name)
    if everything and (told := left_out(model, unfit)):
        warnings.warn(told, InputWarning, stacklevel=2)
    if not layers:
        raise InputError("lora.target_modules: the model has no linear layer that takes adapters")
    generator = torch.Generator().manual_seed(seed)
    for base, layer in layers.items():
        layer.reset_parameters(generator)
        layer.train(base.training)
        for name in targets[base]:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
    adapted = [targets[base][0] for base in layers]
    _rename_ties(model, adapted)
    _call_encoders(model)
    _try_out(layer)
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in adapted):
        _share_inputs(model.get_submodule(parent))
    return model


def _refuse_unready(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, MixedLoRALinear):
            raise InputError("inject: the model has its adapters already; load a state instead")
        if any(each.__name__ == "BaseTunerLayer" for each in type(module).__mro__):
            raise InputError(
                "inject: the model has adapters of PEFT in it; take them out with its unload() or "
                "merge_and_unload(), and inject into what that returns"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise InputError(f"inject: {name} has no shape yet; call the model once first")


def _rename_ties(model: nn.Module, adapted: Sequence[str]) -> None:
    """Tell transformers under which names it finds the tied weights of adapted layers."""
    for prefix, module in model.named_modules():
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = getattr(module, attribute, None)
            if isinstance(ties, dict) and ties:
                inside = [name.removeprefix(f"{prefix}.") for name in adapted]
                now = {
                    f"{n}.{own}": f"{n}.base.{own}" for n in inside for own in ("weight", "bias")
                }
                setattr(module, attribute, {now.get(k, k): now.get(v, v) for k, v in ties.items()})


def _call_encoders(model: nn.Module) -> None:
    """Keep PyTorch's encoders from reading their linear layers' weights in evaluation.

    Their fast path computes with those alone; without it the layers are called, as in training.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer) and any(
            isinstance(inner, MixedLoRALinear) for inner in module.modules()
        ):
            module.use_nested_tensor = False
            module.activation_relu_or_gelu = 0


@torch.no_grad()
def _try_out(layer: MixedLoRALinear) -> None:
    """Refuses an implementation that cannot run, before anything is trained with it."""
    like = layer.weight if isinstance(layer.weight, Tensor) else layer.individual.a
    if like.is_meta:
        return
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
        narrow = [p.dtype for p in module.parameters() if p.dtype.itemsize < 4]
        if narrow and isinstance(module, nn.Embedding):
            module.float().register_forward_hook(partial(_narrow, narrow[0]))
        elif narrow:
            module.float().register_forward_pre_hook(_widen)
    model.fedalt_heads = tuple(names)  # type: ignore[assignment]


def _widen(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return arguments[0].float(), *arguments[1:]


def _narrow(dtype: torch.dtype, module: nn.Module, arguments: object, output: Tensor) -> Tensor:
    return output.to(dtype)


def _share_inputs(module: nn.Module) -> None:
    """Let a module's adapted layers that read the same input share their pass over it."""
    for names in READ_ONE_INPUT:
        layers = [getattr(module, name, None) for name in names]
        adapted = [layer for layer in layers if isinstance(layer, MixedLoRALinear)]
        if len(adapted) > 1:
            MixedLoRALinear.share_input(adapted)
