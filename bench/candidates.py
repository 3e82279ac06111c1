"""Everything that can serve a case: the layer under each schedule, and its peers; and their check.

A candidate is held to `fedalt_kernels.reference` in float64, output and every gradient, by the
Frobenius norm of the difference over that of the truth.  It may err twice as much as the reference
does in the candidate's own dtype, and half a unit in the last place on top.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch

from fedalt_kernels import Adapter, MixedLoRALinear, mixed_lora_linear
from fedalt_kernels.reference import reference

from .cases import Case, schedules
from .device import Call, missing
from .peers import PEFT_NAMES, Unfused, mixed_layer, two_peft_loras

PLAIN = "plain frozen linear"
OURS = "ours"
UNFUSED = "unfused"
COMPILED = "unfused, torch.compile"
PEFT = "two PEFT LoRAs, ungated"
SEED = 77  # of the mask
DTYPE = torch.bfloat16


class Verdict(NamedTuple):
    """Of a check: the largest relative error, and why the candidate is refused, if it is."""

    error: float
    refusal: str


class Forced(nn.Module):
    """The layer's own call, made to use one schedule; None leaves the choice to it."""

    def __init__(self, layer: MixedLoRALinear, schedule: str | None) -> None:
        super().__init__()
        self.layer, self.schedule = layer, schedule
        self.seed: Tensor | None = None  # None draws one a call, as in training

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        return mixed_lora_linear(
            x,
            layer.weight,
            layer.bias,
            layer.adapters,
            layer.mixer,
            scaling=layer.scaling,
            dropout_p=layer.dropout if self.training else 0.0,
            seed=self.seed,
            impl="triton",
            schedule=self.schedule,
        )


def names_for(case: Case) -> list[str]:
    """The candidates of a case, in the order of the table."""
    return [PLAIN, OURS, *(f"{OURS}, {s}" for s in schedules(case)), UNFUSED, COMPILED, PEFT]


def absence(name: str) -> str:
    """Why a candidate cannot be had on this machine, or nothing."""
    return missing("peft") if name == PEFT else ""


def layer_of(case: Case, device: torch.device) -> MixedLoRALinear:
    """The case's layer, the same on every call."""
    torch.manual_seed(0)
    layer = case.layer
    return mixed_layer(layer.n, layer.k, case.rank, case.dropout, DTYPE, device, bias=False)


def inputs_of(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """x [M, K] and dY [M, N], the same on every call."""
    torch.manual_seed(1)
    x = torch.randn(case.m, case.layer.k, device=device, dtype=DTYPE)
    dy = torch.randn(case.m, case.layer.n, device=device, dtype=DTYPE)
    return x.requires_grad_(case.direction != "forward"), dy


def build(name: str, layer: MixedLoRALinear) -> nn.Module:
    """A candidate of the layer's values."""
    if name == PLAIN:
        return layer.base
    if name.startswith(OURS):
        return Forced(layer, name.removeprefix(OURS).removeprefix(", ") or None)
    if name == PEFT:
        return two_peft_loras(layer)
    unfused = Unfused(layer)
    if name == UNFUSED:
        return unfused
    # A backward that is timed alone runs many times over what one forward kept.
    functorch.donated_buffer = False
    return torch.compile(unfused, fullgraph=True, dynamic=False)


def trained(name: str, peer: Any) -> list[Tensor]:
    """A candidate's own mixer, A and B, as far as it trains them."""
    if name == PLAIN:
        return []
    if name.startswith(OURS):
        return [peer.layer.mixer, peer.layer.individual.a, peer.layer.individual.b]
    if name == PEFT:
        inner = peer.base_model.model.linear
        return [inner.lora_A[PEFT_NAMES[0]].weight, inner.lora_B[PEFT_NAMES[0]].weight]
    return [peer.router.weight, peer.downs[0].weight, peer.ups[0].weight]


def call_of(case: Case, name: str, peer: nn.Module, x: Tensor, dy: Tensor) -> Call:
    """What is timed: the case's direction of one candidate; gradients are returned, not summed."""
    wanted = [x, *trained(name, peer)]
    if case.direction == "forward":
        return torch.no_grad()(lambda: peer(x))
    if case.direction == "both":
        return lambda: torch.autograd.grad(peer(x), wanted, dy)
    y = peer(x)
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def check(case: Case, name: str, device: torch.device) -> Verdict:
    """Runs a candidate once, and judges what it returns; peers run without their own dropout."""
    layer, (x, dy) = layer_of(case, device), inputs_of(case, device)
    peer = build(name, layer)
    dropout, seed = 0.0, torch.tensor(SEED, device=device)
    if isinstance(peer, Forced):
        peer.seed, dropout = seed, case.dropout
    else:
        peer.eval()
    backward = case.direction != "forward"
    got = _results(peer, x, trained(name, peer), dy, backward)
    truth = _specified(name, layer, x, dy, backward, torch.float64, dropout)
    eager = _specified(name, layer, x, dy, backward, DTYPE, dropout)
    floor = torch.finfo(DTYPE).eps / 4  # half a unit in the last place, at its mean
    errors = [relative_error(mine, true) for mine, true in zip(got, truth, strict=True)]
    limits = [2 * relative_error(own, true) + floor for own, true in zip(eager, truth, strict=True)]
    what = ("y", "dX", "dG", "dA", "dB") if len(got) != 4 else ("y", "dX", "dA", "dB")
    wrong = [
        f"{label} is off by {error:.1e}, allowed is {limit:.1e}"
        for label, error, limit in zip(what, errors, limits, strict=False)
        if not error <= limit
    ]
    return Verdict(max(errors), "; ".join(wrong))


def relative_error(mine: Tensor, true: Tensor) -> float:
    """The Frobenius norm of the difference over that of the truth."""
    return ((mine.double() - true.double()).norm() / true.double().norm()).item()


def _results(
    peer: Any, x: Tensor, factors: list[Tensor], dy: Tensor, backward: bool
) -> list[Tensor]:
    """y, and with it every gradient."""
    if not backward:
        with torch.no_grad():
            return [peer(x)]
    y = peer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *factors], dy)]


def _specified(
    name: str,
    layer: MixedLoRALinear,
    x: Tensor,
    dy: Tensor,
    backward: bool,
    dtype: torch.dtype,
    dropout: float,
) -> list[Tensor]:
    """What the specification returns in a dtype, for what a candidate claims to compute."""
    weight = layer.weight.detach().to(dtype)
    factors = [t.detach().to(dtype).requires_grad_() for pair in layer.adapters for t in pair]
    mixer = layer.mixer.detach().to(dtype).requires_grad_()
    gated = name != PEFT

    def specified(x: Tensor) -> Tensor:
        if name == PLAIN:
            return torch.nn.functional.linear(x, weight)
        adapters = [Adapter(*factors[:2]), Adapter(*factors[2:])]
        return reference(
            x,
            weight,
            None,
            adapters,
            mixer if gated else None,
            scaling=layer.scaling,
            dropout_p=dropout,
            seed=SEED,
        )

    wanted = [] if name == PLAIN else [*([mixer] if gated else []), *factors[:2]]
    wide = x.detach().to(dtype).requires_grad_(backward)
    return _results(specified, wide, wanted, dy.to(dtype), backward)
