"""Every method does what its row of the table says, in ``combine`` and in whole runs."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import fedalt
from fedalt.config.schema import Config
from fedalt.config.settings import config_from_dict
from fedalt.methods.fedalt import METHODS, get_method
from fedalt.store.checkpoint import OPTIMIZER, SERVER
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
    assert_equal,
    round_of,
    run_nudged,
    size,
    toys,
)
from .method_table import KEEP_LOCAL, KEEP_MOMENTS, OWN, SECOND_START, TABLE, changed, ending, row

SENDERS = [name for name in TABLE if TABLE[name].sends]


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
        declared.check(client, combined.install(client), Counted(clients))
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
            assert_equal(used, trained if name in KEEP_LOCAL else after)
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
            allowed = 2 * number * 2.0**-24 * (abs(wanted) + abs(total[layer])) + 2.0**-45 * abs(
                sizes
            )
            assert (abs(change.double().numpy() - total[layer]) <= allowed).all()


@pytest.mark.parametrize("name", TABLE)
def test_first_states(name, played):
    """One first A for all but where each draws its own; a second adapter's A is zero, the same or
    one more draw, one for all; every B is zero."""
    first = {client: played(name).saved(0).next(client).read() for client in EXAMPLES}
    ann = first["ann"]
    for client in ("bob", "cyd"):
        apart = changed(first[client], ann)
        own_draw = set(ending(ann, (A, MIXER))) if name == "fedalt-own-start" else set()
        assert apart == own_draw
    for state in first.values():
        assert not any(tensor.any() for tensor in ending(state, (B, ROW_B)).values())
        for key, tensor in ending(state, (ROW_A,)).items():
            own, start = state[key.replace(ROW_A, A)], SECOND_START.get(name, "zero")
            assert tensor.any() == (start != "zero")
            assert torch.equal(tensor, own) == (start == "same")
        mixers = [list(tensor.shape) for tensor in ending(state, (MIXER,)).values()]
        wide = [2] if name == "fedalt-scalar" else [2, 32]
        assert mixers == ([wide] * 2 if MIXER in TABLE[name].trains else [])


@pytest.mark.parametrize("name", TABLE)
def test_only_kept_moments_are_kept(name, played):
    run, keeps = played(name), name in KEEP_MOMENTS
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
        with pytest.raises(
            fedalt.InputError, match=f"client_ranks.bob: {name.replace('+', '.')} wants"
        ):
            fedalt.Federation(mixed).run()
        assert not (tmp_path / "run").exists()
