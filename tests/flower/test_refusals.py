"""Sites and settings that are turned away, in one line that says why."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedalt.errors import InputError, RunFailed
from fedalt.flower.parcel import LAST, ROUND
from fedalt.flower.server import Server
from fedalt.flower.site import Site
from tests.flower.loopback import events, federation, own_settings, serve, small


@pytest.fixture
def config(tiny_config):
    evaluate = replace(tiny_config.evaluate, every=2, parts=False, answers=0, max_new_tokens=2)
    return small(tiny_config, rounds=2, evaluate=evaluate)


def change(base, other, module):
    """A copy of a base with other weights in one of its modules."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    model.get_submodule(module).weight.data += 1
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(base).save_pretrained(other)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model.path": "OTHER"}, "client 'bob' is on another base than 'ann'"),
        ({"train.batch_size": 2}, "train.batch_size is not a site's to set"),
        ({"data.path": "DATA"}, "a site is one client, this has ann, bob, cyd"),
        ({"out": ""}, "out: a site keeps its client there"),
    ],
)
def test_a_site_that_does_not_fit_is_turned_away_in_one_line(
    config, tmp_path, settings, reason, tiny_base
):
    other = tmp_path / "other"
    if settings.get("model.path"):
        change(tiny_base, other, "model.embed_tokens")
    names = {"OTHER": str(other), "DATA": config.data.path}
    settings = {key: names.get(value, value) for key, value in settings.items()}
    link = federation(config, tmp_path / "sites")
    link.sites[2] = Site(own_settings(config, "bob", tmp_path / "sites") | settings)
    serve(link, config, tmp_path, wait=0.5)
    (turned,) = events(tmp_path, "refuse")
    assert turned["reason"].startswith("node 2: ")
    assert reason in turned["reason"]
    assert "\n" not in turned["reason"]
    assert {e["client"] for e in events(tmp_path, "train")} == {"ann", "cyd"}


@pytest.mark.parametrize(
    ("module", "others", "told"),
    [
        ("model.layers.0.self_attn.v_proj", "fp8", True),  # stored alike, the bits must be the same
        ("model.layers.0.self_attn.v_proj", "none", False),  # nobody can tell a rounded weight's
        ("model.norm", "none", True),  # what is stored alike whatever the linear layers are
    ],
)
def test_a_quantized_site_on_another_base_is_turned_away_where_it_can_be_known(
    config, tmp_path, module, others, told, tiny_base
):
    change(tiny_base, tmp_path / "other", module)
    link = federation(config, tmp_path / "sites", **{"model.quantization": others})
    own = own_settings(config, "bob", tmp_path / "sites")
    stored = {"model.path": str(tmp_path / "other"), "model.quantization": "fp8"}
    link.sites[2] = Site(own | stored)
    serve(link, config, tmp_path, wait=0.5)
    reasons = [e["reason"] for e in events(tmp_path, "refuse")]
    assert bool(reasons) == told
    assert all("client 'bob' is on another base than 'ann'" in reason for reason in reasons)


def test_another_version_is_turned_away(config, tmp_path, monkeypatch):
    from fedalt.flower import site

    link = federation(config, tmp_path / "sites")

    def fault(node, kind, parcel, honest):
        if node == 3:
            monkeypatch.setattr(site, "__version__", "9.9")
        try:
            return honest()
        finally:
            monkeypatch.undo()

    link.fault = fault
    serve(link, config, tmp_path, wait=0.5)
    (turned,) = events(tmp_path, "refuse")
    assert "this site 9.9; install the same" in turned["reason"]


@pytest.mark.parametrize("registered", [False, True])
def test_a_client_stays_with_its_node(config, tmp_path, registered):
    """Another node that claims it is refused: while its own is there, or, registered, for ever."""
    config = replace(config, federation=replace(config.federation, round_timeout=0.5))
    link = federation(config, tmp_path / "sites")

    def fault(node, kind, parcel, honest):
        if node == 1 and kind == ROUND and parcel.values["round"] == 1:
            link.sites[7] = Site(own_settings(config, "bob", tmp_path / "thief"))
            if registered:
                link.gone.add(2)
                return None
        if kind == ROUND and parcel.values["round"] == 1 and not registered and link.waits < 2:
            return None if node == 3 else honest()
        return honest()

    link.fault = fault
    serve(link, config, tmp_path, registered=registered)
    reasons = [e["reason"] for e in events(tmp_path, "refuse")]
    bound = "is bound to node 2, this is 7" if registered else "is node 2, which is there"
    assert any(f"node 7: client 'bob' {bound}" in reason for reason in reasons)
    assert not (tmp_path / "thief" / "bob" / "checkpoints").exists()


def test_a_server_whose_folder_was_lost_is_refused_by_its_sites(config, tmp_path):
    serve(federation(config, tmp_path / "sites"), config, tmp_path)
    with pytest.raises(RunFailed, match="is past round 2, and the server asks for 1"):
        Server(
            federation(config, tmp_path / "sites"),
            replace(config, out=str(tmp_path / "fresh")),
            3,
            5.0,
        ).run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "fedalt-svd"}, "method: fedalt-svd wants more of a server than one sum"),
        ({"method": "local"}, "method: local wants more"),
        ({"federation": {"aggregate": "median"}}, "federation.aggregate: median wants every"),
        ({"federation": {"holdout": 0.4}}, "federation.holdout: sites come by themselves"),
        ({"federation": {"secure": True}}, "federation.min_clients is 2, and of fewer than 3"),
    ],
)
def test_what_is_not_for_sites_is_refused_by_name(config, changes, message):
    if "federation" in changes:
        changes = {"federation": replace(config.federation, **changes["federation"])}
    with pytest.raises(InputError, match=message):
        Server(federation(config, Path("sites")), replace(config, **changes), 3, 1.0)


def test_too_few_sites_end_the_run_before_its_first_round(config, tmp_path):
    link = federation(config, tmp_path / "sites", ("ann",))
    with pytest.raises(RunFailed, match=r"1 sites came in 0\.1 s"):
        serve(link, config, tmp_path, wait=0.1)
    assert LAST not in [kind for _, kind, _ in link.sent]
