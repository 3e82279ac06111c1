"""What a user would pick instead of `MixedLoRALinear`, each holding the same values as it does."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedalt_kernels import Adapter, MixedLoRALinear

PEFT_NAMES = ("individual", "rest_of_world")


class Unfused(nn.Module):
    """The layer as the method's authors wrote it: every step a module, every result kept.

    All parameters have the base's dtype, which is the fastest choice here.
    """

    def __init__(self, layer: MixedLoRALinear) -> None:
        super().__init__()
        dtype = layer.weight.dtype
        self.base = copy.deepcopy(layer.base)
        self.router = linear_of(layer.mixer, dtype)
        self.dropout = nn.Dropout(layer.dropout)
        self.downs = nn.ModuleList(linear_of(a, dtype) for a, _ in layer.adapters)
        self.ups = nn.ModuleList(linear_of(b, dtype) for _, b in layer.adapters)
        self.scaling = layer.scaling

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.softmax(self.router(x), dim=-1, dtype=torch.float32).to(x.dtype)
        y = self.base(x)
        dropped = self.dropout(x)
        for e, (down, up) in enumerate(zip(self.downs, self.ups, strict=True)):
            y = y + gates[..., e : e + 1] * up(down(dropped)) * self.scaling
        return y


def linear_of(weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    """A bias-free linear layer with this weight, trainable where the weight is."""
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, device=weight.device, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return linear.requires_grad_(weight.requires_grad)


class _Single(nn.Module):
    """One linear layer under the name that PEFT is told to replace."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def one_peft_lora(layer: MixedLoRALinear) -> nn.Module:
    """A PEFT model over the base with one LoRA of the layer's rank, untrained."""
    import peft  # not on every machine that times the others

    config = peft.LoraConfig(
        r=layer.rank,
        lora_alpha=layer.alpha,
        lora_dropout=layer.dropout,
        target_modules=["linear"],
    )
    return peft.get_peft_model(_Single(copy.deepcopy(layer.base)), config, PEFT_NAMES[0])


def two_peft_loras(layer: MixedLoRALinear) -> nn.Module:
    """A PEFT model over the base with two active LoRAs, the second frozen; they add ungated."""
    model = one_peft_lora(layer)
    model.add_adapter(PEFT_NAMES[1], model.peft_config[PEFT_NAMES[0]])
    model.base_model.set_adapter(list(PEFT_NAMES))
    inner = model.base_model.model.linear
    with torch.no_grad():
        for name, (a, b) in zip(PEFT_NAMES, layer.adapters, strict=True):
            inner.lora_A[name].weight.copy_(a)
            inner.lora_B[name].weight.copy_(b)
    inner.lora_A[PEFT_NAMES[1]].requires_grad_(False)
    inner.lora_B[PEFT_NAMES[1]].requires_grad_(False)
    return model


def mixed_layer(
    outputs: int,
    inputs: int,
    rank: int,
    dropout: float,
    dtype: torch.dtype,
    device: torch.device | None = None,
    bias: bool = True,
) -> MixedLoRALinear:
    """The layer in mid-training: none of its factors is zero."""
    base = nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)
    layer = MixedLoRALinear(base, rank=rank, dropout=dropout)
    for factors in (layer.individual, layer.rest_of_world):
        nn.init.normal_(factors.a, std=inputs**-0.5)
        nn.init.normal_(factors.b, std=0.1)
    return layer


def all_peers(layer: MixedLoRALinear) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name, in the order of the table."""
    return {
        "plain frozen linear": copy.deepcopy(layer.base),
        "MixedLoRALinear": layer,
        "unfused": Unfused(layer),
        "unfused, torch.compile": torch.compile(Unfused(layer), fullgraph=True),
        "two PEFT LoRAs, ungated": two_peft_loras(layer),
    }


def expected(layer: MixedLoRALinear, name: str, x: Tensor) -> Tensor:
    """What a peer must return without dropout, in float64."""
    wide = copy.deepcopy(layer).double()
    adapters: tuple[Adapter, ...] = () if name.startswith("plain") else wide.adapters
    gates: Tensor | None = None
    if "PEFT" not in name:
        gates = torch.softmax(x.double() @ wide.mixer.T, dim=-1)
    y = wide.base(x.double())
    for e, (a, b) in enumerate(adapters):
        part = wide.scaling * (x.double() @ a.T @ b.T)
        y = y + (part if gates is None else gates[:, e : e + 1] * part)
    return y
