"""The base model: load it, put the mixed-LoRA layers in, take adapters out and in.

One base serves all clients. A client is a ``State``: the tensors of its adapters and mixers by
name, copied into the layers when its turn comes.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedalt.config import BUILTIN_BASE, ModelConfig
from fedalt.errors import InputError
from fedalt_kernels import MixedLoRALinear

State = dict[str, Tensor]
"""Adapter tensors by name, such as ``model.layers.0.self_attn.q_proj.individual.a``."""

INDIVIDUAL, REST_OF_WORLD, MIXER = "individual", "rest_of_world", "mixer"
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
        InputError: no such model, or no such device.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = config.path
    if path == BUILTIN_BASE:
        path = str(Path(__file__).parent / "assets" / "base")
    try:
        device = torch.empty(0, device=config.device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"model.device: {config.device!r} cannot be used: {reason}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, config.dtype))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"model.path: cannot load {config.path!r}: {reason}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.to(device)
    return model.requires_grad_(False).eval(), tokenizer


def inject(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 32,
    dropout: float = 0.05,
    target_modules: str | Sequence[str] = ("q_proj", "v_proj"),
    seed: int = 0,
    *,
    rest_of_world: bool = True,
    mixer: bool | tuple[float, ...] = True,
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

    Returns:
        The same model.

    Raises:
        InputError: a name that no linear layer of the model has, adapters are in already, or
            ``impl`` cannot run here.
    """
    names = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    if any(isinstance(module, MixedLoRALinear) for module in model.modules()):
        raise InputError("inject: the model has its adapters already; load a state instead")
    targets = _target_names(model, names)
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
    _try_out(layer)
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in targets):
        _share_inputs(model.get_submodule(parent))
    return model


@torch.no_grad()
def _try_out(layer: MixedLoRALinear) -> None:
    """Refuses an implementation that cannot run, before anything is trained with it."""
    try:
        layer(layer.weight.new_zeros(1, layer.in_features))
    except RuntimeError as error:
        raise InputError(f"lora.impl: {error}") from None


def _share_inputs(module: nn.Module) -> None:
    """Let a module's adapted layers that read the same input share their pass over it."""
    for names in READ_ONE_INPUT:
        layers = [getattr(module, name, None) for name in names]
        adapted = [layer for layer in layers if isinstance(layer, MixedLoRALinear)]
        if len(adapted) > 1:
            MixedLoRALinear.share_input(adapted)


def adapter_state(model: nn.Module) -> State:
    """All that makes a client: a copy, in host memory, of every adapter and mixer tensor."""
    return {name: t.detach().to("cpu", copy=True) for name, t in _adapter_tensors(model)}


def individual_state(model: nn.Module) -> State:
    """A copy of the individual adapters' A and B: all that ever leaves a client."""
    return select(adapter_state(model), INDIVIDUAL)


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a whole client into the model.

    Raises:
        ValueError: a name is missing or unknown, or a shape differs.
    """
    _copy_in(model, state, lambda name: True)


def load_rest_of_world(model: nn.Module, row: Mapping[str, Tensor]) -> None:
    """Copy a Rest-of-World, one of ``rest_of_world(updates)``, into the model's frozen adapters.

    Its names are those of the individual adapters it is the mean of, or of the frozen ones.
    """
    _copy_in(model, as_rest_of_world(row), lambda name: is_part(name, REST_OF_WORLD))


def as_rest_of_world(update: Mapping[str, Tensor]) -> State:
    """The same tensors under the names of the Rest-of-World adapters."""
    return {
        name.replace(f".{INDIVIDUAL}.", f".{REST_OF_WORLD}."): tensor
        for name, tensor in update.items()
    }


def select(state: Mapping[str, Tensor], part: str) -> State:
    """The tensors of one part of a state: ``individual``, ``rest_of_world`` or ``mixer``."""
    return {name: tensor for name, tensor in state.items() if is_part(name, part)}


def is_part(name: str, part: str) -> bool:
    return part in name.rsplit(".", 2)[-2:]


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and first values of the frozen weights, to know the base by."""
    digest = hashlib.sha256()
    adapters = {name for name, _ in _adapter_tensors(model)}
    for name, tensor in model.named_parameters():
        if name not in adapters:
            head = tensor.detach().flatten()[:1024].float().cpu()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(head.numpy().tobytes())
    return digest.hexdigest()


def _adapter_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for prefix, layer in model.named_modules():
        if isinstance(layer, MixedLoRALinear):
            for name, tensor in layer.named_parameters():
                if not name.startswith("base."):
                    yield f"{prefix}.{name}", tensor


@torch.no_grad()
def _copy_in(model: nn.Module, state: Mapping[str, Tensor], wanted: Callable[[str], bool]) -> None:
    tensors = {name: tensor for name, tensor in _adapter_tensors(model) if wanted(name)}
    for name in sorted(tensors.keys() ^ state.keys()):
        fault = "is missing from the state" if name in tensors else "is not in the model"
        raise ValueError(f"{name} {fault}; rank, target_modules and base must be the state's own")
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)}, the model wants {tuple(tensor.shape)}"
            raise ValueError(f"{name} has shape {shapes}")
        tensor.copy_(state[name])


def _target_names(model: nn.Module, wanted: tuple[str, ...]) -> list[str]:
    """Dotted names of the layers to replace, in the model's order."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {
        name: module
        for name, module in model.named_modules()
        if name and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
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


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
