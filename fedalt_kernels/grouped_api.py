"""The functional form for rows of many clients, and what it accepts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .adapter import Adapter
from .api import mixed_lora_linear
from .checks import IMPLEMENTATIONS, check_seed, check_tensors
from .choice import plain
from .dropout import SEED_LIMIT
from .grouped_autograd import GroupedCall, GroupedMixedLoRA
from .kinds import find
from .quantized import QuantizedWeight
from .reference import grouped_reference
from .segments import Segments


def mixed_lora_linear_grouped(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    mixer: Tensor | tuple[float, ...] | None,
    clients: Segments | Tensor | Sequence[int],
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seeds: Tensor | Sequence[int] | None = None,
    impl: str = "auto",
) -> Tensor:
    """`mixed_lora_linear` for rows of C clients over one base, each with its own adapters.

    Row m, of client c, becomes::

        y_m = W x_m + b + s Σ_e g_e B_ce A_ce dropout(x_m),    g = softmax(mixer_c x_m)

    The base product is one over all rows, and clients' segments are not padded to each other.

    Args:
        x: [..., K], M rows; the dtypes are those of `mixed_lora_linear`, also under autocast.
        weight: [N, K], or a `QuantizedWeight`; frozen.
        bias: [N] or None, frozen.
        adapters: 1 to 8 of ``Adapter(a [C, r_e, K], b [C, N, r_e])``, client after client.
        mixer: Tensor [C, E, K]; or a tuple of E fixed gates for all clients; or None, every gate 1.
        clients: of each row of x, from 0 to C - 1, in any order; a client may have no row.  Of
            fewer than M, each stands for as many rows, one after another, so that of x [B, L, K] B
            will do.  Many layers on one batch take `Segments.of(clients, C)`, made once.
        scaling: s.
        dropout_p: as in `mixed_lora_linear`.
        seeds: C of the dropout masks, in [0, 2**63): an int64 tensor or ints.  A client's mask is a
            function of its seed and the order of its own rows: the one it has alone.  None draws
            them.
        impl: "torch", "triton" (kernels that no GPU has run yet), "reference" (a loop over clients)
            or "auto": "torch", and for one client what `mixed_lora_linear` takes.

    Returns:
        [..., N] in x's dtype.  Gradients come in the stacked shapes, zero for a client without
        rows.  They cannot be differentiated again; under torch.func's transforms and on the meta
        device the reference serves.  torch.compile takes the clients as `Segments` or a list.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: a shape, dtype, device or value does not fit.
        RuntimeError: ``impl`` cannot run here.
    """
    check_tensors(x, weight, bias)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    count = _clients_stacked(adapters, mixer)
    firsts = [Adapter(a[0], b[0]) for a, b in adapters]
    gates = mixer[0] if isinstance(mixer, Tensor) else mixer
    settings = scaling, dropout_p, "torch" if impl == "auto" else impl, None
    plan = find(x, weight, bias, firsts, gates, settings)
    if not isinstance(clients, Segments):
        clients = Segments.of(clients, count)
    elif len(clients.sizes) != count:
        raise ValueError(f"clients must be segments of {count}, got {len(clients.sizes)}")
    compiling, drawn = torch.compiler.is_compiling(), None
    plainly = plan.impl == "reference" and (compiling or plain(x))
    if plan.threshold and not (seeds is None and plainly):
        drawn = _seeds(seeds, count, x.device)
    if count == 1 and impl == "auto":
        return mixed_lora_linear(
            x,
            weight,
            bias,
            firsts,
            gates,
            scaling=scaling,
            dropout_p=dropout_p,
            seed=None if drawn is None else drawn[0],
        )
    if plan.dtype is not None:
        x, bias = x.to(plan.dtype), None if bias is None else bias.to(plan.dtype)
        weight = weight.to(plan.dtype) if isinstance(weight, Tensor) else weight
    if plan.impl == "reference":
        if isinstance(weight, QuantizedWeight):
            weight = weight.dequantize(x.dtype)
        return grouped_reference(
            x,
            weight,
            bias,
            adapters,
            mixer,
            clients.of_rows(x.shape[:-1].numel(), x.device),
            scaling=scaling,
            dropout_p=dropout_p,
            seeds=drawn,
        )
    if not compiling:  # else the operator does, of sizes that are no constants of the graph
        clients = clients.of_rows(x.shape[:-1].numel(), x.device)
    call = GroupedCall(plan.constants, weight, bias, clients, drawn)
    factors = [a for a, _ in adapters] + [b for _, b in adapters]
    learned = mixer if isinstance(mixer, Tensor) else None
    result: Tensor = GroupedMixedLoRA.apply(call, x, learned, *factors)
    return result


def _clients_stacked(adapters: Sequence[Adapter], mixer: Tensor | tuple[float, ...] | None) -> int:
    """C, which all tensors agree on."""
    named: dict[str, Tensor] = {}
    for e, adapter in enumerate(adapters):
        if not isinstance(adapter, tuple):
            raise TypeError(f"adapters[{e}] must be an Adapter(a, b), got {type(adapter).__name__}")
        named |= {f"adapters[{e}].a": adapter[0], f"adapters[{e}].b": adapter[1]}
    if not named:
        raise ValueError("adapters must be 1 to 8, got 0")
    if isinstance(mixer, Tensor):
        named["mixer"] = mixer
    count = 0
    for name, tensor in named.items():
        if tensor.dim() != 3 or not tensor.shape[0]:
            raise ValueError(f"{name} must be stacked [C, ., .], got {list(tensor.shape)}")
        count = count or tensor.shape[0]
        if tensor.shape[0] != count:
            raise ValueError(f"{name} must be of {count} clients, got {tensor.shape[0]}")
    return count


def _seeds(seeds: Tensor | Sequence[int] | None, count: int, device: torch.device) -> Tensor:
    """One a client, int64 [C]."""
    if seeds is None:
        return torch.randint(SEED_LIMIT - 1, (count,), device=device)
    if len(seeds) != count:
        raise ValueError(f"seeds must be {count}, one a client, got {len(seeds)}")
    if not isinstance(seeds, Tensor):
        for seed in seeds:
            check_seed(seed)
        return torch.tensor(list(seeds), dtype=torch.int64)
    check_seed(seeds[0])
    return seeds
