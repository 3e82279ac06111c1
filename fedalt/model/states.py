"""Clients as states: the tensors of adapters, mixers and trained heads, out of a model and in.

One base serves all clients. A client is a ``State``, copied into the model when its turn comes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from fedalt.errors import InputError
from fedalt.model.quantized import is_quantized
from fedalt_kernels import MixedLoRALinear, QuantizedWeight, unused_layers

State = dict[str, Tensor]
"""Tensors by name, such as ``model.layers.0.self_attn.q_proj.individual.a``."""

INDIVIDUAL, REST_OF_WORLD, MIXER, HEAD = "individual", "rest_of_world", "mixer", "head"


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def part_of(name: str) -> str:
    """What a tensor of a state is: ``individual.a``, ``rest_of_world.b``, ``mixer``, ``head``."""
    *_, owner, leaf = f"..{name}".rsplit(".", 2)
    if owner in (INDIVIDUAL, REST_OF_WORLD):
        return f"{owner}.{leaf}"
    return MIXER if leaf == MIXER else HEAD


def is_part(name: str, part: str) -> bool:
    """Whether a tensor belongs to ``part``, which may be half an adapter: ``individual.b``."""
    return part in (part_of(name), part_of(name).partition(".")[0])


def select(state: Mapping[str, Tensor], *parts: str) -> State:
    """The tensors of a state that belong to any of ``parts``."""
    return {name: state[name] for name in state if any(is_part(name, part) for part in parts)}


def renamed(state: Mapping[str, Tensor], old: str, new: str) -> State:
    """All tensors; those of the part ``old`` under the names that they have in ``new``."""
    return {name.replace(f".{old}.", f".{new}."): state[name] for name in state}


def as_rest_of_world(update: Mapping[str, Tensor]) -> State:
    """The same tensors under the names of the Rest-of-World adapters."""
    return renamed(update, INDIVIDUAL, REST_OF_WORLD)


def mixed_layers(model: nn.Module) -> Iterator[tuple[str, MixedLoRALinear]]:
    """Name and layer of every adapted linear layer."""
    for name, module in model.named_modules():
        if isinstance(module, MixedLoRALinear):
            yield name, module


def adapter_state(model: nn.Module) -> State:
    """All that makes a client: a copy, in host memory, of every adapter, mixer and head tensor."""
    return {name: t.detach().to("cpu", copy=True) for name, t in client_tensors(model)}


def individual_state(model: nn.Module) -> State:
    """A copy of the individual adapters' A and B: all that ever leaves a client of FedALT."""
    return select(adapter_state(model), INDIVIDUAL)


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a whole client into the model. Adapters alone in their layer take the state's rank.

    Raises:
        ValueError: a name is missing or unknown, or a shape differs.
    """
    for prefix, layer in mixed_layers(model):
        a = state.get(f"{prefix}.{INDIVIDUAL}.a")
        if a is not None and layer.rest_of_world is None and a.shape[0] != layer.rank:
            layer.set_rank(a.shape[0])
    _copy_in(model, state, lambda name: True)


def load_rest_of_world(model: nn.Module, row: Mapping[str, Tensor]) -> None:
    """Copy a Rest-of-World, one of ``rest_of_world(updates)``, into the model's frozen adapters.

    Its names are those of the individual adapters it is the mean of, or of the frozen ones.
    """
    _copy_in(model, as_rest_of_world(row), lambda name: is_part(name, REST_OF_WORLD))


def set_trainable(model: nn.Module, parts: Sequence[str]) -> None:
    """Let the tensors of ``parts``, and no others, ask for a gradient."""
    for name, tensor in client_tensors(model):
        tensor.requires_grad_(any(is_part(name, part) for part in parts))


def without_gradient(model: nn.Module) -> list[str]:
    """Names of the adapted layers, then of the trained heads, that no gradient has reached."""
    names = unused_layers(model)
    for name in getattr(model, "fedalt_heads", ()):
        trained = [p for p in model.get_submodule(name).parameters() if p.requires_grad]
        if trained and all(p.grad is None for p in trained):
            names.append(name)
    return names


def fresh_state(model: nn.Module, seed: int) -> State:
    """A first state: adapters and mixers drawn from ``seed``, the head as it stands."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in mixed_layers(model):
        layer.reset_parameters(generator)
    return adapter_state(model)


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, first values and sums of the frozen weights, to know the base by.

    The sums are of the numbers' bits, as whole numbers, so they are the same in any order. Of a
    quantized weight, its scales count as well.
    """
    digest = hashlib.sha256()
    adapters = {name for name, _ in client_tensors(model)}
    packed = {
        f"{name}.weight": QuantizedWeight.of(module).tensors
        for name, module in model.named_modules()
        if is_quantized(module)
    }
    for name, parameter in model.named_parameters():
        for tensor in () if name in adapters else packed.get(name, (parameter.detach(),)):
            head = tensor.flatten()[:1024].float().cpu()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(head.numpy().tobytes())
            bits = tensor.view(_BITS[tensor.element_size()])
            digest.update(str(int(bits.sum(dtype=torch.int64))).encode())
    return digest.hexdigest()


def frame_fingerprint(model: nn.Module) -> str:
    """SHA-256 over what of a base is the same however its linear layers are stored.

    Those are the frozen weights outside of linear layers, such as embeddings and norms, and the
    name and shape [N, K] of every linear layer.
    """
    digest = hashlib.sha256()
    adapters = {name for name, _ in client_tensors(model)}
    for name, module in model.named_modules():
        own = [(f"{name}.{leaf}", p) for leaf, p in module.named_parameters(recurse=False)]
        if is_quantized(module) or isinstance(module, nn.Linear):
            weight = QuantizedWeight.of(module) if is_quantized(module) else module.weight
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            continue
        for full, parameter in own:
            if full not in adapters:
                digest.update(f"{full} {tuple(parameter.shape)} {parameter.dtype}".encode())
                bits = parameter.detach().view(_BITS[parameter.element_size()])
                digest.update(str(int(bits.sum(dtype=torch.int64))).encode())
    return digest.hexdigest()


class BaseWeights:
    """The adapted layers' base weights as they were loaded, for methods that add to them.

    A quantized one takes no sum.
    """

    def __init__(self, model: nn.Module) -> None:
        """Copies every adapted layer's weight [N, K] into host memory.

        Raises:
            InputError: one is quantized, as a checkpoint of few bits has them, or tied to another
                module, as an output head to the embeddings, which would change with it.
        """
        self._model = model
        owners = Counter(id(p) for module in model.modules() for p in module.parameters(False))
        for name, layer in mixed_layers(model):
            if any(owners[id(p)] > 1 for p in layer.base.parameters()):
                raise InputError(
                    f"lora.target_modules: {name} is tied to another module, and this method adds "
                    "to base weights; leave it out"
                )
        self._first = {
            name: _dense(layer).to("cpu", copy=True) for name, layer in mixed_layers(model)
        }

    @torch.no_grad()
    def add(self, change: Mapping[str, Tensor]) -> None:
        """Set each weight to the first one plus ``change``, float32 [N, K] by layer name."""
        for name, layer in mixed_layers(self._model):
            weight = self._first[name]
            if name in change:
                weight = (weight.float() + change[name]).to(weight.dtype)
            _dense(layer).copy_(weight)


def _dense(layer: MixedLoRALinear) -> Tensor:
    if isinstance(layer.weight, Tensor):
        return layer.weight
    raise InputError(
        "model.path: this method adds to base weights, but that of a layer is quantized; "
        "use a base that is not"
    )


def client_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every tensor that makes a client, by name: of adapted layers, then of trained heads."""
    for prefix, layer in mixed_layers(model):
        for name, tensor in layer.named_parameters():
            if not name.startswith("base."):
                yield f"{prefix}.{name}", tensor
    for prefix in getattr(model, "fedalt_heads", ()):
        for name, tensor in model.get_submodule(prefix).named_parameters():
            yield f"{prefix}.{name}", tensor


@torch.no_grad()
def _copy_in(model: nn.Module, state: Mapping[str, Tensor], wanted: Callable[[str], bool]) -> None:
    tensors = {name: tensor for name, tensor in client_tensors(model) if wanted(name)}
    for name in sorted(tensors.keys() ^ state.keys()):
        fault = "is missing from the state" if name in tensors else "is not in the model"
        raise ValueError(f"{name} {fault}; rank, target_modules and base must be the state's own")
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)}, the model wants {tuple(tensor.shape)}"
            raise ValueError(f"{name} has shape {shapes}")
        tensor.copy_(state[name])


@contextmanager
def fixed_gates(model: nn.Module, gates: Mapping[str, tuple[float, float]]) -> Iterator[None]:
    """While it lasts, the two adapters of each named layer have these weights for every token."""
    layers = {name: layer for name, layer in mixed_layers(model) if name in gates}
    before = {name: (layer.mixer, layer.fixed) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.mixer, layer.fixed = None, gates[name]
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.mixer, layer.fixed = before[name]


def adapter_alone(model: nn.Module, part: str) -> AbstractContextManager[None]:
    """While it lasts, one of two adapters has weight 1 in every layer and the other none."""
    alone = (1.0, 0.0) if part == INDIVIDUAL else (0.0, 1.0)
    both = (name for name, layer in mixed_layers(model) if layer.rest_of_world is not None)
    return fixed_gates(model, dict.fromkeys(both, alone))
