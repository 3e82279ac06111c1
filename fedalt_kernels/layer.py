"""The module: wraps a linear layer, owns the adapters and the mixer."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .api import mixed_lora_linear
from .base import FrozenBase, LowRank, kaiming_uniform_
from .checks import IMPLEMENTATIONS
from .sharing import SharedInput

SCALAR = "scalar"


class MixedLoRALinear(FrozenBase):
    """A frozen linear layer with an individual LoRA, a frozen Rest-of-World LoRA and a mixer::

        [g_0, g_1] = softmax(mixer x)
        y = W x + bias + (alpha / rank) (g_0 B_0 A_0 + g_1 B_1 A_1) dropout(x)

    Parameters (N outputs, K inputs, r = rank): ``base.weight``, ``base.bias`` (frozen),
    ``individual.a`` [r, K], ``individual.b`` [N, r], ``mixer`` [2, K] (trainable),
    ``rest_of_world.a`` [r, K], ``rest_of_world.b`` [N, r] (frozen).  The base keeps its dtype; the
    others are float32 (float64 over a float64 base), on the base's device.

    A quantized base stays as it is stored; W and the bias are taken in x's dtype, in which the
    layer computes and which it returns, so x is not quantized and needs no compute dtype.

    Args:
        base: an ``nn.Linear``; a Hugging Face ``Conv1D``, which stores its weight as [K, N]; a
            quantized bitsandbytes ``Linear4bit`` or ``Linear8bitLt``; or an `Fp8Linear`.
        rank: r, at least 1.
        alpha: the adapters are scaled by alpha / rank.
        dropout: of the adapters' input, in training mode; rounded to a multiple of 1/256.
        rest_of_world: False for one plain LoRA with neither Rest-of-World nor mixer.
        mixer: True for the softmax mixer above; "scalar" for one trained ``mixer`` [2] a layer,
            [g_0, g_1] = softmax(mixer) for every token; a tuple of two floats for fixed weights;
            None to add both adapters with weight 1.
        impl: see `mixed_lora_linear`.

    Raises:
        TypeError: the base is of another kind, its weight is not floating point, not made yet or
            made anew at every call (weight norm, pruning), it waits to be quantized when it is
            moved to its device, it computes more than W x + bias, or it is ``out_proj`` of an
            ``nn.MultiheadAttention``, which reads its weight and never calls it.
        ValueError: rank, alpha, dropout or mixer is out of range, or a quantized weight is not
            stored as `QuantizedWeight` says.
    """

    shared: SharedInput | None  # the layers that read the same x
    individual: LowRank
    rest_of_world: LowRank | None
    mixer: nn.Parameter | None

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float = 32,
        dropout: float = 0.05,
        *,
        rest_of_world: bool = True,
        mixer: bool | str | tuple[float, ...] | None = True,
        impl: str = "auto",
    ) -> None:
        super().__init__(base)
        self.shared = None
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha must be a positive number, got {alpha!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
        if not rest_of_world and isinstance(mixer, tuple | str):
            raise ValueError(f"mixer must be True or None without a Rest-of-World, got {mixer!r}")
        if not (mixer in (True, None, SCALAR) or _are_weights(mixer)):
            wanted = f"True, {SCALAR!r}, None or 2 finite floats"
            raise ValueError(f"mixer must be {wanted}, got {mixer!r}")
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
        self.rank, self.alpha, self.dropout, self.impl = rank, alpha, dropout, impl
        self.scaling = alpha / rank
        base.requires_grad_(False)
        weight = self.weight
        wide = isinstance(weight, Tensor) and weight.dtype == torch.float64
        dtype = torch.float64 if wide else torch.float32

        def zeros(rows: int, columns: int) -> Tensor:
            return torch.zeros(rows, columns, dtype=dtype, device=weight.device)

        n, k = weight.shape
        self.individual = LowRank(zeros(rank, k), zeros(n, rank), trainable=True)
        self.rest_of_world = (
            LowRank(zeros(rank, k), zeros(n, rank), trainable=False) if rest_of_world else None
        )
        self.names = ("individual", "rest_of_world") if rest_of_world else ("individual",)
        self.fixed = cast("tuple[float, ...]", mixer) if _are_weights(mixer) else None
        learned = None
        if mixer in (True, SCALAR) and rest_of_world:
            learned = nn.Parameter(zeros(2, k) if mixer is True else zeros(2, 1).flatten())
        self.register_parameter("mixer", learned)
        self.reset_parameters()

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The adapters in the order of the mixer's rows: individual, then Rest-of-World."""
        owned = [self._owned(name) for name in self.names]
        return tuple([Adapter(each["a"], each["b"]) for each in owned])

    @torch.no_grad()
    def set_rank(self, rank: int) -> None:
        """Give the individual adapter another rank, zeros in it; the scale becomes alpha / rank.

        Raises:
            ValueError: the layer has a Rest-of-World, which goes by the same scale.
        """
        if self.rest_of_world is not None:
            raise ValueError("set_rank wants a layer without a Rest-of-World")
        n, k = self.weight.shape
        a, b = self.individual.a, self.individual.b
        self.individual = LowRank(a.new_zeros(rank, k), b.new_zeros(n, rank), trainable=True)
        self.rank, self.scaling = rank, self.alpha / rank

    @staticmethod
    def share_input(layers: Sequence["MixedLoRALinear"]) -> None:
        """Tell layers that are called with one x, in this order, such as q, k and v, to share.

        On a GPU they then make their low-rank products in one pass over it; results stay the same.
        """
        shared = SharedInput(layers)
        for layer in layers:
            layer.shared = shared

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Kaiming uniform (a = √5) for ``individual.a`` and a token-wise mixer, zero for the rest.

        Values are drawn on the generator's device, so one seed gives one start on every device.
        """
        kaiming_uniform_(self.individual.a, generator)
        nn.init.zeros_(self.individual.b)
        if self.rest_of_world is not None:
            nn.init.zeros_(self.rest_of_world.a)
            nn.init.zeros_(self.rest_of_world.b)
        if self.mixer is not None and self.mixer.ndim == 1:
            nn.init.zeros_(self.mixer)
        elif self.mixer is not None:
            kaiming_uniform_(self.mixer, generator)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N]."""
        bias = self._owned("base")["bias"]
        if self.quantized and bias is not None:
            bias = bias.to(x.dtype)
        mixer, adapters = self._parameters["mixer"], self.adapters
        if mixer is not None and mixer.ndim == 1:  # g B A is the adapter (A, g B) with weight 1
            gates = torch.softmax(mixer, 0)
            adapters = tuple([Adapter(a, g * b) for g, (a, b) in zip(gates, adapters, strict=True)])
            mixer = None
        made = None if self.shared is None else self.shared.take(self, x, adapters)
        return mixed_lora_linear(
            x,
            self.weight,
            bias,
            adapters,
            self.fixed if mixer is None else mixer,
            scaling=self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
            impl=self.impl,
            seed=None if made is None else made.seed,
            strip=None if made is None else made.strip,
        )

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}, impl={self.impl!r}"


def unused_layers(model: nn.Module) -> list[str]:
    """Dotted names of the mixed layers in ``model`` that a backward has left without a gradient.

    Ask between ``loss.backward()`` and ``zero_grad()``. Such a layer was not called, since its
    model reads its weight directly, or what it returned does not reach the loss: either way its
    adapters change nothing. Of an expert that got no token, or a layer that was skipped at random,
    a later batch tells more.

    Layers of which nothing is trainable are left out.
    """
    names = []
    for name, layer in model.named_modules():
        if isinstance(layer, MixedLoRALinear):
            trained = [p for p in layer.parameters() if p.requires_grad]
            if trained and all(p.grad is None for p in trained):
                names.append(name)
    return names


def _are_weights(mixer: object) -> bool:
    return isinstance(mixer, tuple) and len(mixer) == 2 and all(map(math.isfinite, mixer))
