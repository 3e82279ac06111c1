"""The module for many clients: one frozen linear layer, every client's adapters and mixers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .base import FrozenBase, LowRank, kaiming_uniform_
from .checks import IMPLEMENTATIONS
from .grouped_api import mixed_lora_linear_grouped
from .layer import MixedLoRALinear
from .segments import Segments


class GroupedMixedLoRALinear(FrozenBase):
    """`MixedLoRALinear` for C clients over one base, each row of x with its own client's adapters::

        [g_0, g_1] = softmax(mixer_c x)
        y = W x + bias + (alpha / rank) (g_0 B_c0 A_c0 + g_1 B_c1 A_c1) dropout(x)

    Its parameters are those of C such layers, stacked: ``individual.a`` [C, r, K], ``individual.b``
    [C, N, r], ``mixer`` [C, 2, K] (or [C, 2], one for every token), and the frozen
    ``rest_of_world.a`` and ``.b``; ``base`` is shared, and frozen.

    Args:
        base: as in `MixedLoRALinear`.
        clients: C, at least 1.
        rank, alpha, dropout, rest_of_world, mixer: as in `MixedLoRALinear`, for all clients.
        impl: as in `mixed_lora_linear_grouped`.

    Attributes:
        segments_of: told x, finds its `Segments` where a call names no clients, as in a model that
            calls its layers with x alone; None: a call has to.

    Raises:
        TypeError, ValueError: as `MixedLoRALinear`, or ``clients`` or ``impl`` is out of range.
    """

    individual: LowRank
    rest_of_world: LowRank | None
    mixer: nn.Parameter | None

    def __init__(
        self,
        base: nn.Module,
        clients: int,
        rank: int = 8,
        alpha: float = 32,
        dropout: float = 0.05,
        *,
        rest_of_world: bool = True,
        mixer: bool | str | tuple[float, ...] | None = True,
        impl: str = "auto",
    ) -> None:
        super().__init__(base)
        if not isinstance(clients, int) or clients < 1:
            raise ValueError(f"clients must be an integer of at least 1, got {clients!r}")
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
        one = MixedLoRALinear(base, rank, alpha, dropout, rest_of_world=rest_of_world, mixer=mixer)
        self.clients, self.rank, self.alpha, self.dropout = clients, rank, alpha, dropout
        self.scaling, self.names, self.fixed, self.impl = one.scaling, one.names, one.fixed, impl
        self.segments_of: Callable[[Tensor], Segments] | None = None

        def stacked(adapter: LowRank, trainable: bool) -> LowRank:
            a, b = (
                each.detach().new_zeros(clients, *each.shape) for each in (adapter.a, adapter.b)
            )
            return LowRank(a, b, trainable=trainable)

        self.individual = stacked(one.individual, trainable=True)
        self.rest_of_world = one.rest_of_world and stacked(one.rest_of_world, trainable=False)
        learned = one.mixer
        if learned is not None:
            learned = nn.Parameter(learned.detach().new_zeros(clients, *learned.shape))
        self.register_parameter("mixer", learned)
        self.reset_parameters()

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The stacked adapters in the order of the mixers' rows: individual, then Rest-of-World."""
        owned = [self._owned(name) for name in self.names]
        return tuple([Adapter(each["a"], each["b"]) for each in owned])

    @torch.no_grad()
    def reset_parameters(self, generators: Sequence[torch.Generator] | None = None) -> None:
        """Every client's first values are those of a `MixedLoRALinear` with its generator.

        Raises:
            ValueError: the generators are not one a client.
        """
        drawn = [None] * self.clients if generators is None else list(generators)
        if len(drawn) != self.clients:
            raise ValueError(f"generators must be {self.clients}, one a client, got {len(drawn)}")
        for adapter in self.adapters:
            for factor in adapter:
                nn.init.zeros_(factor)
        mixer = self.mixer
        if mixer is not None:
            nn.init.zeros_(mixer)
        for client, generator in enumerate(drawn):
            kaiming_uniform_(self.individual.a[client], generator)
            if mixer is not None and mixer.ndim == 3:
                kaiming_uniform_(mixer[client], generator)

    def forward(
        self,
        x: Tensor,
        clients: Segments | Tensor | Sequence[int] | None = None,
        seeds: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """x [..., K] to [..., N]; clients and the dropout's seeds as `mixed_lora_linear_grouped`.

        Raises:
            ValueError: no clients are named, neither here nor by ``segments_of``.
        """
        if clients is None:
            if self.segments_of is None:
                raise ValueError("clients must be named: this layer serves many")
            clients = self.segments_of(x)
        return apply_stacked(self, x, self.adapters, self.mixer, clients, seeds, self.impl)

    def extra_repr(self) -> str:
        rank, alpha, dropout = self.rank, self.alpha, self.dropout
        return f"clients={self.clients}, rank={rank}, alpha={alpha}, dropout={dropout}"


def apply_stacked(
    layer: MixedLoRALinear | GroupedMixedLoRALinear,
    x: Tensor,
    adapters: Sequence[Adapter],
    mixer: Tensor | None,
    clients: Segments | Tensor | Sequence[int],
    seeds: Tensor | Sequence[int] | None = None,
    impl: str = "auto",
) -> Tensor:
    """A layer's base and settings, with stacked adapters and mixers in the place of its own.

    Args:
        adapters: of ``Adapter(a [C, r, K], b [C, N, r])``, in the order of the mixer's rows.
        mixer: [C, E, K] or [C, E]; None for the layer's fixed gates.
        x, clients, seeds, impl: as in `mixed_lora_linear_grouped`.
    """
    bias = layer.bias
    if layer.quantized and bias is not None:
        bias = bias.to(x.dtype)
    if mixer is not None and mixer.ndim == 2:  # g B A is the adapter (A, g B) with weight 1
        gates = torch.softmax(mixer, 1)[..., None, None].unbind(1)  # E of [C, 1, 1]
        adapters = [Adapter(a, g * b) for g, (a, b) in zip(gates, adapters, strict=True)]
        mixer = None
    return mixed_lora_linear_grouped(
        x,
        layer.weight,
        bias,
        adapters,
        layer.fixed if mixer is None else mixer,
        clients,
        scaling=layer.scaling,
        dropout_p=layer.dropout if layer.training else 0.0,
        seeds=seeds,
        impl=impl,
    )
