"""Every method against one table: what it trains, sends and installs, in ``combine`` and in a run."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import fedalt
from fedalt.checkpoint import OPTIMIZER, SERVER
from fedalt.config import Config
from fedalt.methods import METHODS, get_method
from fedalt.settings import config_from_dict
from tests.conftest import write_client

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
    Nudged,
    State,
    assert_equal,
    assert_product,
    renamed,
    round_of,
    run_nudged,
    size,
    toys,
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
    "fedalt-warm": FEDALT,  # from the third round; WARMING before
}
WARMING = Row(MIXED, OWN, OWN, averaged(*OWN))
SENDERS = [name for name, row in TABLE.items() if row.sends]


def row(name: str, number: int) -> Row:
    return WARMING if name == "fedalt-warm" and number <= 2 else TABLE[name]


def ending(state: Mapping[str, torch.Tensor], ends: tuple[str, ...]) -> State:
    return {name: tensor for name, tensor in state.items() if ends and name.endswith(ends)}


def changed(before: State, after: State) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def config(tiny_base, tmp_path_factory) -> Config:
    """Two rounds on the q projections of the tiny base, whose head is trained whole."""
    root = tmp_path_factory.mktemp("methods")
    for client, count in EXAMPLES.items():
        write_client(root / "data" / client, client[0], count)
    lora = {"rank": 2, "alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    return config_from_dict(
        {
            "rounds": 2,
            "threads": 1,
            "out": str(root / "run"),
            "model": {"path": str(tiny_base)},
            "lora": lora,
            "data": {"path": str(root / "data")},
        }
    )


@pytest.fixture(scope="module")
def played(config) -> Callable[..., Nudged]:
    """A method's nudged run, played once; ``without`` is a client of rank 0."""
    runs: dict[tuple[str, str], Nudged] = {}

    def play(name: str, without: str = "") -> Nudged:
        if (name, without) not in runs:
            lora = replace(config.lora, client_ranks={without: 0} if without else {})
            changes = {"lora": lora, "method": name, "out": f"{config.out}-{name}{without}"}
            rounds = 3 if name == "fedalt-warm" else 2
            with pytest.MonkeyPatch.context() as patch:
                runs[name, without] = run_nudged(config, patch, rounds=rounds, **changes)
        return runs[name, without]

    return play


def test_every_method_has_a_row_and_every_row_a_method():
    assert TABLE.keys() == METHODS.keys()


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("name", SENDERS)
def test_combine_on_whole_numbers(name, number):
    """Three counted clients, and one that was not, which gets what a newcomer gets."""
    clients, declared = toys(), row(name, number)
    fresh = ending(toys(rank=1, n=5)["ann"], OWN)
    fresh = {n: t * 0 if n.endswith(B) else t for n, t in fresh.items()}
    combined = get_method(name).combine(
        round_of(name, clients, number=number, fresh=lambda client: fresh)
    )
    for client in (*clients, "", "zoe"):
        declared.check(client, combined.install(client), Counted(clients, number))
    if declared.into_base is None:
        assert (combined.base, combined.extra_bytes) == ({}, 0)


@pytest.mark.parametrize("name", TABLE)
def test_training_moves_the_declared_parts_alone(name, played):
    for (number, client), trained in played(name).trained.items():
        before = played(name).before[number, client]
        assert changed(before, trained) == set(ending(trained, row(name, number).trains))


@pytest.mark.parametrize("name", TABLE)
def test_the_declared_parts_alone_leave_a_client(name, played):
    run = played(name)
    for (number, client), update in run.handed.items():
        wanted = ending(run.trained[number, client], row(name, number).sends)
        assert_equal(update, wanted)
        if wanted:
            assert run.traffic(number)[client][0] == size(wanted)


@pytest.mark.parametrize("name", TABLE)
def test_a_round_installs_what_follows_from_its_training(name, played):
    """Installed parts as the table says, all others as training left them; so at every client."""
    run = played(name)
    for number in range(1, run.config.rounds + 1):
        declared, saved, counted = row(name, number), run.saved(number), run.counted(number)
        for client, trained in counted.states.items():
            after = saved.next(client).read()
            installed = ending(after, declared.installs)
            assert_equal({**after, **installed}, {**trained, **installed})
            used = saved.used(client).read()
            assert_equal(used, trained if name == "fedit+ft" else after)
            if declared.check:
                declared.check(client, installed, counted)
            if number < run.config.rounds:
                assert_equal(run.before[number + 1, client], after)
        if declared.check:
            newcomer = saved.state(SERVER, "newcomer").read()
            declared.check("", newcomer, counted)
            extra = 0
            if declared.into_base is not None:  # factors of the 32 by 32 change, where smaller
                extra = 2 * 4 * min((3 * 2 + declared.into_base) * (32 + 32), 32 * 32)
            for _, received in run.traffic(number).values():
                assert received == size(newcomer) + extra
        else:
            assert run.traffic(number) == {}
            assert not saved.has(SERVER, "newcomer")


@pytest.mark.parametrize("name", TABLE)
def test_the_base_changes_where_the_table_says_by_the_products(name, played):
    """FLoRA adds ``Σ p s B A``; FedEx-LoRA that less ``s B̄ Ā`` of what it installs."""
    run, total = played(name), {}
    for number in (1, 2):
        added = row(name, number).into_base
        assert run.saved(number).has(SERVER, "base") == (added is not None)
        if added is None:
            continue
        counted, got = run.counted(number), run.saved(number).state(SERVER, "base").read()
        assert sorted(got) == counted.layers()
        means = counted.mean(A, B)
        for layer, change in got.items():
            wanted, sizes = counted.product(layer), counted.product(layer)
            if name == "fedex-lora":
                b, a = (means[f"{layer}.{part}"].double().numpy() for part in (B, A))
                wanted = wanted - SCALE * b @ a
            total[layer] = total.get(layer, 0.0) + wanted
            # one fp32 rounding a round of the change and of the sum; fp64 far below
            allowed = 2 * number * 2.0**-24 * (abs(wanted) + abs(total[layer])) + 2.0**-45 * abs(sizes)
            assert (abs(change.double().numpy() - total[layer]) <= allowed).all()


@pytest.mark.parametrize("name", TABLE)
def test_first_states(name, played):
    """One first A for all but where each draws its own; a second adapter that starts as the first
    has that A too; every B is zero."""
    first = {client: played(name).saved(0).next(client).read() for client in EXAMPLES}
    ann = first["ann"]
    for client in ("bob", "cyd"):
        apart = changed(first[client], ann)
        own_draw = set(ending(ann, (A, MIXER))) if name == "fedalt-own-start" else set()
        assert apart == own_draw
    for state in first.values():
        assert not any(tensor.any() for tensor in ending(state, (B, ROW_B)).values())
        for key, tensor in ending(state, (ROW_A,)).items():
            start = state[key.replace(ROW_A, A)]
            assert torch.equal(tensor, start if name in ("feddpa", "fedalt-one-a") else start * 0)
        mixers = [list(tensor.shape) for tensor in ending(state, (MIXER,)).values()]
        wide = [2] if name == "fedalt-scalar" else [2, 32]
        assert mixers == ([wide] * 2 if MIXER in TABLE[name].trains else [])


@pytest.mark.parametrize("name", TABLE)
def test_only_the_kept_optimizer_is_kept(name, played):
    run, keeps = played(name), name == "fedalt-kept-optimizer"
    for client in EXAMPLES:
        assert run.moments[1, client] == ({} if keeps else None)
        assert run.saved(2).has(OPTIMIZER, client) == keeps
        if keeps:
            assert_equal(dict(run.moments[2, client]), {"w.step": torch.tensor(1.0)})


@pytest.mark.parametrize("name", TABLE)
def test_a_client_of_rank_0_trains_no_adapter_sends_nothing_and_gets_what_others_make(name, played):
    run = played(name, without="cyd")
    for number in range(1, run.config.rounds + 1):
        declared, saved, counted = row(name, number), run.saved(number), run.counted(number, "cyd")
        trained = run.trained[number, "cyd"]
        still = tuple(part for part in declared.trains if part in (MIXER, HEAD))
        assert changed(run.before[number, "cyd"], trained) == set(ending(trained, still))
        assert run.handed[number, "cyd"] == {}
        if declared.check:
            assert run.traffic(number)["cyd"][0] == 0
            for client in EXAMPLES:
                installed = ending(saved.next(client).read(), declared.installs)
                declared.check(client, installed, counted)


@pytest.mark.parametrize("name", TABLE)
def test_other_ranks_are_refused_by_name_where_a_method_cannot_mix_them(name, config, tmp_path):
    lora = replace(config.lora, client_ranks={"bob": 1})
    mixed = replace(config, method=name, lora=lora, out=str(tmp_path / "run"), rounds=1)
    if name in ("local", "flora", "flexlora"):
        with pytest.MonkeyPatch.context() as patch:
            run = run_nudged(mixed, patch)
        ranks = {c: ending(run.trained[1, c], (A,)).popitem()[1].shape[0] for c in EXAMPLES}
        assert ranks == {"ann": 2, "bob": 1, "cyd": 2}
    else:
        with pytest.raises(fedalt.InputError, match=f"client_ranks.bob: {name.replace('+', '.')} wants"):
            fedalt.Federation(mixed).run()
        assert not (tmp_path / "run").exists()
