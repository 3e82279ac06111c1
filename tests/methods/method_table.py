"""What every method is, as one table: trained, sent and installed parts, and what is installed.

Written from the methods' papers, apart from ``fedalt.methods``; sums are ``method_cases``' own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from .method_cases import (
    EXAMPLES,
    HEAD,
    MIXER,
    ROW_A,
    ROW_B,
    SCALE,
    A,
    B,
    Counted,
    State,
    assert_equal,
    assert_product,
    renamed,
    truncated,
)

Check = Callable[[str, Mapping[str, torch.Tensor], Counted], None]
"""Client, what it installed, and what counted: raises where one does not follow from the other."""


@dataclass(frozen=True)
class Row:
    """A row of the table: names are endings of tensors' names.

    Attributes:
        check: of what is installed; ``None`` where nothing is.
        into_base: the rank that a round adds to the base beside the clients' own; None: nothing.
    """

    trains: tuple[str, ...]
    sends: tuple[str, ...]
    installs: tuple[str, ...]
    check: Check | None
    into_base: int | None = None


def exactly(formula: Callable[[str, Counted], State]) -> Check:
    return lambda client, got, counted: assert_equal(got, formula(client, counted))


def averaged(*parts: str) -> Check:
    return exactly(lambda client, counted: counted.mean(*parts))


def row_of(weights: Callable[[str, Counted], Mapping[str, float]], *parts: str) -> Check:
    return exactly(lambda client, c: renamed(c.mean(*parts, weights=weights(client, c))))


def others(client: str, counted: Counted) -> dict[str, float]:
    return counted.others(client)


def others_by_examples(client: str, counted: Counted) -> dict[str, float]:
    return counted.others(client, EXAMPLES)


def everyone(client: str, counted: Counted) -> dict[str, float]:
    return counted.others("nobody")


def softmax_of_cosines(client: str, counted: Counted) -> dict[str, float]:
    """``exp(cos / 0.1)``, of all layers' B as one vector."""
    vectors = {
        c: np.concatenate([state[n].double().numpy().ravel() for n in counted.names(B)])
        for c, state in counted.states.items()
    }
    if client not in vectors:
        return counted.others("nobody")
    own = vectors.pop(client)
    cosines = {c: v @ own / math.sqrt((v @ v) * (own @ own)) for c, v in vectors.items()}
    return {c: math.exp(cosine / 0.1) for c, cosine in cosines.items()}


def relayed(client: str, got: Mapping[str, torch.Tensor], counted: Counted) -> None:
    assert_equal(got, counted.mean(ROW_A, ROW_B, weights=counted.others(client)))


def similar(client: str, got: Mapping[str, torch.Tensor], counted: Counted) -> None:
    """Weights that differ by a few 2⁻⁵³ may round to neighbours: one ulp apart at most."""
    wanted = renamed(counted.mean(A, B, weights=softmax_of_cosines(client, counted)))
    assert sorted(got) == sorted(wanted)
    for name, tensor in wanted.items():
        assert ((got[name] == tensor) | (got[name] == tensor.nextafter(got[name]))).all()


def flora(client: str, got: Mapping[str, torch.Tensor], counted: Counted) -> None:
    assert_equal({HEAD: got[HEAD]}, counted.mean(HEAD))
    for name in counted.names(B):
        assert not got[name].any()
    for name in counted.names(A):
        assert got[name].any()
        assert not any(torch.equal(got[name], state[name]) for state in counted.states.values())


def flexlora(client: str, got: Mapping[str, torch.Tensor], counted: Counted) -> None:
    assert_equal({HEAD: got[HEAD]}, counted.mean(HEAD))
    for layer in counted.layers():
        wanted = truncated(counted.product(layer), rank=2)
        assert_product(got, f"{layer}.{A}", f"{layer}.{B}", SCALE, wanted)


def svd_row(client: str, got: Mapping[str, torch.Tensor], counted: Counted) -> None:
    for layer in counted.layers():
        wanted = truncated(counted.product(layer, counted.others(client)), rank=2)
        assert_product(got, f"{layer}.{ROW_A}", f"{layer}.{ROW_B}", SCALE, wanted)


RELAYS = ("fedalt-relay", "fedalt-relay-kept")
OWN, ROW = (A, B), (ROW_A, ROW_B)
ALL = (*OWN, HEAD)
MIXED = (*OWN, MIXER, HEAD)
FEDAVG = Row(ALL, ALL, ALL, averaged(*ALL))
FEDALT = Row(MIXED, OWN, ROW, row_of(others, *OWN))
TABLE = {
    "local": Row(ALL, (), (), None),
    "fedit": FEDAVG,
    "fedit+ft": FEDAVG,
    "ffa-lora": Row((B, HEAD), (B, HEAD), (B, HEAD), averaged(B, HEAD)),
    "fedsa-lora": Row(ALL, (A,), (A,), averaged(A)),
    "fedex-lora": replace(FEDAVG, into_base=2),
    "flora": Row(ALL, ALL, ALL, flora, into_base=0),
    "flexlora": Row(ALL, ALL, ALL, flexlora),
    "feddpa": Row((*OWN, *ROW, HEAD), ROW, ROW, averaged(*ROW)),
    "fedalt": FEDALT,
    "fedalt-half": replace(FEDALT, trains=ALL),
    "fedalt-scalar": FEDALT,
    "fedalt-self": replace(FEDALT, check=row_of(everyone, *OWN)),
    "fedalt-trained-row": replace(FEDALT, trains=(*MIXED, *ROW)),
    "fedalt-weighted": replace(FEDALT, check=row_of(others_by_examples, *OWN)),
    "fedalt-svd": replace(FEDALT, check=svd_row),
    "fedalt-similar": replace(FEDALT, check=similar),
    "fedalt-own-start": FEDALT,
    "fedalt-kept-optimizer": FEDALT,
    "fedalt-one-a": Row((B, MIXER, HEAD), (B,), (ROW_B,), row_of(others, B)),
    **dict.fromkeys(RELAYS, Row((*MIXED, *ROW), ROW, ROW, relayed)),
    "fedalt-warm": FEDALT,  # from the third round; WARMING before
}
KEEP_LOCAL = ("fedit+ft", *RELAYS)
"""Used as they were trained, before the last installation."""
KEEP_MOMENTS = ("fedalt-kept-optimizer", "fedalt-relay-kept")
"""AdamW goes on where it was."""
SECOND_START = {"fedalt-one-a": "same", **dict.fromkeys(("feddpa", *RELAYS), "drawn")}
"""Where the second adapter's first A is not zero: the individual's own, or another draw."""
WARMING = Row(MIXED, OWN, OWN, averaged(*OWN))


def row(name: str, number: int) -> Row:
    """A method's row in a round."""
    return WARMING if name == "fedalt-warm" and number <= 2 else TABLE[name]


def ending(state: Mapping[str, torch.Tensor], ends: tuple[str, ...]) -> State:
    """The tensors whose names end so."""
    return {name: tensor for name, tensor in state.items() if ends and name.endswith(ends)}


def changed(before: State, after: State) -> set[str]:
    """The names of the tensors that are no longer the same."""
    return {name for name in before if not torch.equal(before[name], after[name])}
