"""Which linear layers take adapters: names as in PEFT, and what no name reaches."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from fedalt.errors import InputError
from fedalt.model.quantized import is_quantized

ALL_LINEAR = "all-linear"
SHOWN = 6
"""Names in one line; of more, the rest is counted."""
_FIELD = "lora.target_modules"

Targets = dict[nn.Module, list[str]]
"""Layers, each with every dotted name that it has in the model, in the model's order."""


def find_targets(
    model: nn.Module, wanted: str | Sequence[str], head: nn.Module | None, saved: Sequence[str] = ()
) -> Targets:
    """The linear layers that ``wanted`` names, but those in the modules ``saved``.

    Args:
        model: without adapters.
        wanted: as ``inject`` takes it.
        head: what ``all-linear`` leaves out.
        saved: names of modules that are trained whole.

    Raises:
        InputError: a name or the pattern fits no linear layer.
    """
    linear: Targets = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and (_is_linear(module) or is_quantized(module)):
            linear.setdefault(module, []).append(name)
    body = [name for module, names in linear.items() if module is not head for name in names]
    named = set(body) if is_all_linear(wanted) else _named(linear, wanted, body)
    targets = {module: names for module, names in linear.items() if not named.isdisjoint(names)}
    for module, names in list(targets.items()):
        if any(f"{name}.".startswith(f"{each}.") for name in names for each in saved):
            del targets[module]
    return targets


def is_all_linear(wanted: str | Sequence[str]) -> bool:
    """Whether it is the word for every linear layer, alone or in a list."""
    names = [wanted] if isinstance(wanted, str) else wanted
    return len(names) == 1 and names[0].lower() == ALL_LINEAR


def _named(linear: Targets, wanted: str | Sequence[str], body: Sequence[str]) -> set[str]:
    every = [name for names in linear.values() for name in names]
    if isinstance(wanted, str):
        try:
            found = {name for name in every if re.fullmatch(wanted, name)}
        except re.error as error:
            raise InputError(f"{_FIELD}: {wanted!r} is no regular expression: {error}") from None
        if not found:
            ending = any(_ends(name, wanted) for name in every)
            cure = f"a list takes endings: [{wanted}]" if ending else _known(wanted, body)
            raise InputError(
                f"{_FIELD}: the pattern {wanted!r} is the whole name of no linear layer; {cure}"
            )
        return found
    for target in wanted:
        if not any(_ends(name, target) for name in every):
            known = _known(target, body)
            raise InputError(f"{_FIELD}: no linear layer is named {target!r}; {known}")
    return {name for name in every if any(_ends(name, target) for target in wanted)}


def _known(wanted: str, body: Sequence[str]) -> str:
    leaves = leaves_of(body)
    near = difflib.get_close_matches(wanted, [*leaves, *body], n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"known: {', '.join(leaves)}"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def leaves_of(names: Iterable[str]) -> list[str]:
    """The last words of dotted names, each once, sorted."""
    return sorted({name.rpartition(".")[2] for name in names})


def kind_of(name: str) -> str:
    """A name without its numbers: what layers of one kind in different blocks have in common."""
    return re.sub(r"\d+", "*", name)


def in_short(names: Iterable[str]) -> str:
    """Names in one line, those of one kind as one; of more than ``SHOWN`` the rest is counted."""
    kinds = list(dict.fromkeys(map(kind_of, names)))
    more = f" and {len(kinds) - SHOWN} more" if len(kinds) > SHOWN else ""
    return ", ".join(kinds[:SHOWN]) + more


def left_out(model: nn.Module, unfit: Collection[str]) -> str:
    """What ``all-linear`` does not reach, in one line; empty if it reaches all.

    Stacks of matrices, as experts are kept, and the weights of PyTorch's attention and recurrent
    layers take no adapter, nor do the linear layers ``unfit``. Other than of convolutions,
    embeddings and output heads, nobody would expect it; what is trained whole is not left out.

    Args:
        model: frozen, but for what is trained whole, and without adapters.
        unfit: names of linear layers.
    """
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in sizes)
        if inside or isinstance(module, _ConvNd):
            continue
        if name in unfit or isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            weights = list(module.parameters())
        else:
            weights = [p for p in module.parameters(False) if sum(n > 1 for n in p.shape) > 2]
        size = sum(p.numel() for p in weights if not p.requires_grad)
        if size:
            sizes[name] = size
    if not sizes:
        return ""
    share = sum(sizes.values()) / sum(p.numel() for p in model.parameters())
    return (
        f"{_FIELD}: {ALL_LINEAR} leaves out {100 * share:.1f} % of the parameters, in modules that "
        f"take no adapter: {in_short(sizes)}"
    )
