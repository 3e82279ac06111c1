"""Settings that do not go together are refused before anything is loaded, with the cure."""

from dataclasses import replace

import pytest

import fedalt
from fedalt.config.schema import Config, FederationConfig, LoraConfig
from fedalt.methods import robust
from fedalt.methods.fedalt import METHODS, get_method
from fedalt.run.cohort import held_out
from fedalt.run.stage import check
from tests.methods.method_cases import EXAMPLES, round_of, toys

NAMES = [f"c{i}" for i in range(6)]


def config(method="fedalt", rounds=6, lora=None, **settings):
    return Config(
        method=method,
        rounds=rounds,
        lora=LoraConfig(**(lora or {})),
        federation=FederationConfig(**settings),
    )


def refusal(config, clients=NAMES):
    with pytest.raises(fedalt.InputError) as caught:
        check(config, clients)
    return str(caught.value)


TRIM = {"aggregate": "trimmed"}
ZEROS = {"client_ranks": dict.fromkeys(NAMES[1:], 0)}
NOBODY = "the updates that {} averages in a round, is nobody"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (config("flora", aggregate="median"), "aggregate: flora does more than average"),
        (config("fedalt-svd", **TRIM, trim=0.4), "aggregate: fedalt-svd does more"),
        (
            config(lora=ZEROS),
            "lora.client_ranks: 1 of 6 clients train adapters, federation.min_clients is 2; "
            "raise a 0",
        ),
        (
            config("fedit", participation=0.2),
            "federation.participation: a round draws 1, federation.min_clients is 2; raise it",
        ),
        (config(participation=0.2, max_age=0), "federation.participation: a round draws 1,"),
        (config(participation=0.2, rounds=1), "federation.participation: a round draws 1,"),
        (
            config("fedit", participation=0.34, stragglers=0.5),
            "federation.stragglers: 1 of 2 on time, federation.min_clients is 2; lower it",
        ),
        (config(stragglers=0.5, min_clients=4, max_age=0), "federation.stragglers: 3 of 6 on time"),
        (
            config("feddpa", join_start="nearest"),
            "federation.join_start: 'nearest' copies individual adapters, which never leave a "
            "client of feddpa; use row or fresh",
        ),
        (
            config("fedalt-relay", join_start="nearest"),
            "which never leave a client of fedalt-relay",
        ),
        (
            config("ffa-lora", lora={"client_starts": {"c1": "folder"}}),
            "lora.client_starts: ffa-lora works on one A, the same for all; take them out or",
        ),
        (
            config("fedalt-one-a", lora={"client_starts": {"c1": "folder"}}),
            "lora.client_starts: fedalt-one-a works on one A",
        ),
    ],
)
def test_what_can_never_work_is_refused(wanted, message):
    assert message in refusal(wanted)


@pytest.mark.parametrize(
    "wanted",
    [
        config(participation=0.2),  # last rounds' updates count
        config(stragglers=0.5, min_clients=4),
        config("fedit", participation=0.34),
        config(lora={"client_ranks": dict.fromkeys(NAMES[2:], 0)}),
        config("local", **TRIM, participation=0.2),  # averages nothing
        config("fedalt-one-a", join_start="nearest"),  # its A is everybody's
        config("fedit", join_start="nearest"),  # has one adapter, and welcomes with that
        config("fedsa-lora", lora={"client_starts": {"c1": "folder"}}),
        config("feddpa", lora={"client_starts": {"c1": "folder"}}),
    ],
)
def test_what_can_work_is_not(wanted):
    check(wanted, NAMES)


@pytest.mark.parametrize(
    ("method", "clients", "settings", "least"),
    [
        ("fedit", 6, {}, 0.167),
        ("fedalt", 6, {}, 0.2),
        ("fedalt-self", 6, {}, 0.167),
        ("fedalt-relay", 6, {}, 0.2),
        ("fedit", 6, {"participation": 0.5}, 0.334),
        ("fedalt", 6, {"participation": 0.7}, 0.334),
        ("fedit", 6, {"stragglers": 0.34}, 0.25),
        ("fedit", 100, {"participation": 0.29}, 0.035),
    ],
)
def test_a_trim_must_leave_somebody_out_of_what_is_averaged(method, clients, settings, least):
    """At the stated least it does, a thousandth below it does not, and the cure names it."""
    names = [f"c{i}" for i in range(clients)]
    check(config(method, **TRIM, trim=least, **settings), names)
    message = refusal(config(method, **TRIM, trim=round(least - 0.001, 3), **settings), names)
    assert NOBODY.format(method) in message
    assert message.endswith(f"is nobody; raise it to {least} or more")


@pytest.mark.parametrize(("method", "clients"), [("fedit", 2), ("fedalt", 2), ("fedalt", 3)])
def test_where_no_trim_is_enough_the_cure_is_another(method, clients):
    message = refusal(config(method, **TRIM, trim=0.49), NAMES[:clients])
    assert message.endswith("is nobody; use median or let more clients count")


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.sends and m.averages])
def test_methods_average_as_many_as_they_declare(name, monkeypatch):
    seen = []
    monkeypatch.setattr(robust, "trimmed_mean", lambda updates, trim: seen.append(len(updates)))
    combine = get_method(name).combine
    monkeypatch.setattr("fedalt.methods.fedalt.as_rest_of_world", lambda row: row)
    install = combine(round_of(name, toys(), aggregate="trimmed", number=3)).install
    for client in EXAMPLES:
        install(client)
    assert set(seen) == {3 - get_method(name).leaves_one_out}


@pytest.mark.parametrize("key", ["client_ranks", "client_starts"])
def test_a_held_out_client_has_no_settings_of_its_own(key):
    """It would join at the default rank and start, whatever they say."""
    wanted = config("flora", holdout=0.2)
    (name,) = held_out(NAMES, wanted)
    value = {"client_ranks": 4, "client_starts": "folder"}[key]
    for client in NAMES:
        lora = replace(wanted.lora, **{key: {client: value}})
        if client == name:
            message = refusal(replace(wanted, lora=lora))
            assert message.startswith(
                f"lora.{key}.{name}: federation.holdout holds this client out"
            )
        else:
            check(replace(wanted, lora=lora), NAMES)
