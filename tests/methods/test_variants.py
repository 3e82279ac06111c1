"""FedALT and its variants, each by hand where it differs from FedALT."""

import math
from dataclasses import replace

import pytest
import torch

from fedalt.methods.fedalt import METHODS, get_method
from fedalt.model.states import mixed_layers
from fedalt.run import stage

from .method_cases import (
    EXAMPLES,
    ROW_A,
    ROW_B,
    SCALE,
    A,
    B,
    assert_equal,
    renamed,
    round_of,
    run_nudged,
)
from .method_table import KEEP_LOCAL, RELAYS


def lines(values, part=A):
    """Clients whose one number or row of an adapter is as given."""
    return {
        client: {f"q.{part}": torch.tensor([value]).float().reshape(1, -1)}
        for client, value in zip(EXAMPLES, values, strict=True)
    }


def installed(name, clients, **changes):
    """What ann, bob, cyd and a newcomer install, as lists."""
    install = get_method(name).combine(round_of(name, clients, **changes)).install
    return [install(c)[f"q.{ROW_A}"].flatten().tolist() for c in ("ann", "bob", "cyd", "")]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("fedalt", [7, 5.5, 2.5, 5]),
        ("fedalt-self", [5, 5, 5, 5]),
        ("fedalt-weighted", [6.4, 50 / 14, 2.125, 3.7]),  # of 10, 6 and 4 examples
    ],
)
def test_rest_of_world_of_1_4_and_10(name, rows):
    assert installed(name, lines([1.0, 4.0, 10.0])) == [[torch.tensor(v).item()] for v in rows]


@pytest.mark.parametrize("name", ["fedalt", "fedalt-self", "fedalt-svd"])
def test_examples_have_no_say_unless_the_variant_is_the_weighted_one(name):
    clients = {c: s | lines([1.0, -2.0, 3.0], B)[c] for c, s in lines([1.0, 4.0, 10.0]).items()}
    few = get_method(name).combine(round_of(name, clients, rank=1))
    many = get_method(name).combine(
        round_of(name, clients, rank=1, examples={"ann": 1, "bob": 1000, "cyd": 7})
    )
    for client in ("ann", "bob", "cyd", ""):
        for key, tensor in few.install(client).items():
            assert torch.equal(tensor, many.install(client)[key])


def test_svd_keeps_the_largest_of_the_others_mean_product():
    """Products 2 e₀e₀ᵀ, 3 e₁e₁ᵀ and 5 e₂e₂ᵀ at rank 1: ann keeps 5 / 2 of cyd's, cyd 3 / 2."""
    clients = {
        client: {f"q.{A}": torch.eye(3)[i : i + 1], f"q.{B}": value * torch.eye(3)[:, i : i + 1]}
        for i, (client, value) in enumerate(zip(EXAMPLES, (2.0, 3.0, 5.0), strict=True))
    }
    install = get_method("fedalt-svd").combine(round_of("fedalt-svd", clients, rank=1)).install
    for client, place, value in (("ann", 2, 2.5), ("bob", 2, 2.5), ("cyd", 1, 1.5), ("", 2, 5 / 3)):
        row = install(client)
        wanted = torch.zeros(3, 3)
        wanted[place, place] = value
        torch.testing.assert_close(
            row[f"q.{ROW_B}"] @ row[f"q.{ROW_A}"], wanted, rtol=2**-22, atol=2**-50
        )


def test_similar_clients_weigh_more_by_the_softmax_of_ten_cosines():
    """Ann and bob have B along one axis, cyd across it: weights 1 and exp(-10), or alike."""
    b = lines([(1.0, 0.0), (3.0, 0.0), (0.0, 2.0)], B)
    clients = {client: state | b[client] for client, state in lines([1.0, 4.0, 10.0]).items()}
    far = math.exp(-10)
    wanted = [(4 + 10 * far) / (1 + far), (1 + 10 * far) / (1 + far), 2.5, 5.0]
    got = [row[0] for row in installed("fedalt-similar", clients)]
    assert got == pytest.approx(wanted, rel=2**-23)


@pytest.fixture
def config(tiny_config):
    lora = replace(tiny_config.lora, target_modules=("q_proj",))
    return replace(tiny_config, lora=lora)


def test_one_a_makes_the_rows_product_the_mean_of_products(config, monkeypatch):
    """B̄ is rounded once: ``2⁻²⁴ |B̄| |A|``, and fp64 far below. FedALT's is off by far more."""
    gaps = {}
    for name in ("fedalt-one-a", "fedalt"):
        run = run_nudged(config, monkeypatch, method=name, out=f"{config.out}-{name}")
        counted, gaps[name] = run.counted(2), 0.0
        for client in EXAMPLES:
            row = run.saved(2).used(client).read()
            others = counted.others(client)
            for layer in counted.layers():
                b, a = (
                    row[f"{layer.replace('individual', '')}.{p}"].double().numpy()
                    for p in (ROW_B, ROW_A)
                )
                gap = abs(2 * b @ a - counted.product(layer, others))
                allowed = 2 * 2.0**-24 * abs(b) @ abs(a) + 2.0**-45
                gaps[name] = max(gaps[name], (gap / allowed).max())
    assert gaps["fedalt-one-a"] <= 1
    assert gaps["fedalt"] > 1000


def test_an_absent_clients_last_training_still_counts_up_to_its_age(config, monkeypatch):
    """Cyd trains in the first round only. Its row of then counts in round 2, with age 1 not in 3,
    when it is one that was not counted: it gets the mean of all that were."""
    federation = replace(config.federation, away={"cyd": (2, 3)}, max_age=1)
    run = run_nudged(replace(config, federation=federation, rounds=3), monkeypatch)
    first = run.counted(1).states
    for number, counted in ((2, ("ann", "bob", "cyd")), (3, ("ann", "bob"))):
        last = {**first, **run.counted(number).states}
        for client in EXAMPLES:
            others = [other for other in counted if other != client]
            used = run.saved(number).used(client)
            own = {n: t for n, t in last[others[0]].items() if n.endswith((A, B))}
            for name in own:
                mean = sum(last[other][name].double() for other in others) / len(others)
                assert torch.equal(used[next(iter(renamed({name: 0})))], mean.float())


def test_an_absent_clients_training_is_forgotten_by_fedavg(config, monkeypatch):
    federation = replace(config.federation, away={"cyd": (2,)})
    run = run_nudged(replace(config, federation=federation, method="fedit"), monkeypatch)
    last = run.counted(2).states
    assert list(last) == ["ann", "bob"]
    for client in EXAMPLES:
        for name, tensor in run.saved(2).used(client).read().items():
            mean = (10 * last["ann"][name].double() + 6 * last["bob"][name].double()) / 16
            assert torch.equal(tensor, mean.float())


@pytest.mark.parametrize("name", KEEP_LOCAL)
def test_an_absent_client_that_keeps_local_is_used_as_it_last_was(name, config, monkeypatch):
    """Not with what was installed for its next round."""
    federation = replace(config.federation, away={"cyd": (2,)})
    run = run_nudged(replace(config, federation=federation, method=name), monkeypatch)
    assert_equal(run.saved(2).used("cyd").read(), run.trained[1, "cyd"])


def test_an_absent_client_keeps_its_optimizer(config, monkeypatch):
    federation = replace(config.federation, away={"cyd": (2,)})
    config = replace(config, federation=federation, method="fedalt-kept-optimizer", rounds=3)
    run = run_nudged(config, monkeypatch)
    assert [run.moments[3, client]["w.step"].item() for client in EXAMPLES] == [2, 2, 1]


GATES = {"fedalt-half": (0.5, 0.5), "feddpa": (0.5, 0.5)}


@pytest.mark.parametrize("name", METHODS)
def test_gates_and_scale_are_fixed_where_the_method_fixes_them(name, config):
    model, _ = stage.load_model(replace(config, method=name), ())
    layers = [layer for _, layer in mixed_layers(model)]
    assert {layer.fixed for layer in layers} == {GATES.get(name)}
    factor = 2.0 if name in RELAYS else 1.0
    assert {layer.scaling for layer in layers} == {factor * SCALE}
    alone = not name.startswith(("fedalt", "feddpa"))
    assert all((layer.rest_of_world is None) == alone for layer in layers)
