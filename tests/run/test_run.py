"""Whole runs on a tiny base: what each method leaves behind, and exact resume."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedalt
from bench import kill_resume
from fedalt.config.schema import SAMPLE
from fedalt.model.states import adapter_state, load_adapter_state, select
from fedalt.report.events import read_events
from fedalt.run.cohort import derive_seed
from fedalt.run.stage import set_stage
from fedalt.serving.clients import evaluate_run
from fedalt.store.checkpoint import list_checkpoints, load_latest
from fedalt.store.journal import Progress
from fedalt.training.client import train_client
from tests.conftest import write_client


def quick(config, *, rounds=2, method="fedalt", out=None, **federation):
    """Two steps a round on the query projections; clients are scored at both ends only."""
    return replace(
        config,
        rounds=rounds,
        method=method,
        out=str(out or config.out),
        lora=replace(config.lora, target_modules=("q_proj",)),
        train=replace(config.train, max_steps=2, batch_size=2),
        federation=replace(config.federation, **federation),
        evaluate=replace(config.evaluate, every=99, max_new_tokens=1),
    )


def run(config, **changes):
    """Run, and read the newest checkpoint."""
    config = replace(config, **changes)
    fedalt.Federation(config).run()
    return load_latest(Path(config.out))


def used(saved):
    """By client, all tensors that it uses."""
    return {client: saved.used(client).read() for client in saved.record["clients"]}


def part(state, name):
    """The named part with the part's name taken out of the tensors' names."""
    return {key.replace(f".{name}.", "."): tensor for key, tensor in select(state, name).items()}


def close(left, right):
    return left.keys() == right.keys() and all(
        torch.allclose(left[n].double(), right[n].double(), rtol=0, atol=1e-7) for n in left
    )


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def average(states, weights):
    total = sum(weights)
    return {
        name: sum(w * s[name].double() for s, w in zip(states, weights, strict=True)) / total
        for name in states[0]
    }


def events_of(config, kind):
    return [e for e in read_events(Path(config.out) / "metrics.jsonl") if e["event"] == kind]


def record_of(out: Path) -> dict[str, bytes]:
    """All that a resumed run must have in common with an uncut one."""
    files = [
        *(list_checkpoints(out)[-1]).rglob("*.*"),
        out / "metrics.jsonl",
        out / "results.json",
        out / "latest",
        *(out / "joined").glob("*"),
    ]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_fedalt_leaves_each_client_the_mean_of_the_others(tiny_config):
    states = used(run(tiny_config))
    own = {client: part(state, "individual") for client, state in states.items()}
    for client, state in states.items():
        others = [own[other] for other in own if other != client]
        assert close(part(state, "rest_of_world"), average(others, [1, 1]))
    assert not close(own["ann"], own["bob"])
    mixers = [select(state, "mixer") for state in states.values()]
    assert not close(mixers[0], mixers[1])


def test_the_first_round_is_the_clients_training_from_the_shared_start(tiny_config):
    """The loop adds nothing: one client trained by hand ends where the run says it did."""
    saved = run(tiny_config, rounds=1)
    stage = set_stage(tiny_config)
    bob = next(member for member in stage.known if member.id == "bob")
    assert same(stage.first_state("ann"), stage.first_state("bob"))
    load_adapter_state(stage.model, stage.first_state("bob"))
    train_client(
        stage.model,
        stage.examples(bob).train,
        tiny_config.train,
        stage.task.loss,
        trains=[("individual", "mixer")],
        seed=derive_seed(0, 1, "bob"),
    )
    by_hand, by_run = adapter_state(stage.model), saved.used("bob").read()
    assert same(select(by_hand, "individual", "mixer"), select(by_run, "individual", "mixer"))


def test_fedit_leaves_all_clients_the_weighted_mean(tiny_config):
    config = quick(tiny_config, rounds=1)
    local = used(run(config, method="local", out=config.out + "-local"))
    expected = average([local[c] for c in ("ann", "bob", "cyd")], [10, 6, 4])
    assert all(close(state, expected) for state in used(run(config, method="fedit")).values())


def test_fedit_ft_uses_the_local_state_and_goes_on_from_the_mean(tiny_config):
    config = quick(tiny_config)
    fedit = run(config, method="fedit", out=config.out + "-fedit")
    tuned = run(config, method="fedit+ft")
    for client in ("ann", "bob", "cyd"):
        assert close(tuned.next(client).read(), fedit.next(client).read())
    states = [tuned.used(c).read() for c in ("ann", "bob", "cyd")]
    assert close(average(states, [10, 6, 4]), fedit.next("ann").read())
    assert not close(states[0], states[1])


def test_local_clients_never_meet(tiny_config):
    config = quick(tiny_config, method="local")
    alone = replace(config, data=replace(config.data, clients=("bob",)))
    apart = run(alone, out=config.out + "-alone").used("bob")
    assert same(run(config).used("bob").read(), apart.read())


def test_round_0_scores_the_base_and_results_hold_every_client(tiny_config):
    result = fedalt.Federation(tiny_config).run()
    events = events_of(tiny_config, "evaluate")
    assert [e["round"] for e in events if e["client"] == "ann"] == [0, 1, 2]
    written = json.loads((Path(tiny_config.out) / "results.json").read_text())
    assert written == result.results
    assert list(written["clients"]) == ["ann", "bob", "cyd"]
    ann = written["clients"]["ann"]
    assert ann["last"] == ann["curve"][-1]
    assert ann["best"]["rouge1"] == max(row["rouge1"] for row in ann["curve"])
    assert result.page.exists()
    assert all(name in result.table for name in ("ann", "bob", "cyd"))


def test_training_lowers_the_loss(tiny_config):
    config = replace(tiny_config, rounds=1, train=replace(tiny_config.train, max_steps=50))
    result = fedalt.Federation(config).run()
    for client in result.results["clients"].values():
        assert client["last"]["loss"] < client["curve"][0]["loss"] / 2


def test_a_client_can_be_loaded_again(tiny_config):
    config = quick(tiny_config)
    result = fedalt.Federation(config).run()
    model, tokenizer = fedalt.load_client(result.out, "bob")
    inputs = tokenizer("say 1", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
    assert same(adapter_state(model), load_latest(result.out).used("bob").read())
    with pytest.raises(fedalt.InputError, match="no client 'zoe'; known: ann, bob, cyd"):
        fedalt.load_client(result.out, "zoe")


def test_an_evaluation_afresh_gives_the_runs_own_scores(tiny_config, tiny_data, tmp_path):
    config = quick(tiny_config)
    result = fedalt.Federation(config).run()
    table = evaluate_run(result.out)
    for client in result.results["clients"].values():
        assert f"{client['last']['loss']:.3f}" in table
    bob = f"{result.results['clients']['bob']['last']['loss']:.3f}"
    alone = evaluate_run(result.out, client_id="bob")
    assert bob in alone
    assert "ann" not in alone
    write_client(tmp_path / "other" / "bob", "z", 2)
    other = evaluate_run(result.out, data=str(tmp_path / "other"))
    assert "bob" in other
    assert bob not in other
    with pytest.raises(fedalt.InputError, match="no client 'ann' there"):
        evaluate_run(result.out, client_id="ann", data=str(tmp_path / "other"))
    write_client(tmp_path / "other" / "zoe", "z", 2)
    with pytest.raises(fedalt.InputError, match=r"other: .*no client 'zoe'; known: ann, bob, cyd"):
        evaluate_run(result.out, data=str(tmp_path / "other"))


def test_a_lone_client_has_no_rest_of_world(tiny_config):
    alone = replace(tiny_config, data=replace(tiny_config.data, clients=("bob",)))
    with pytest.raises(fedalt.InputError, match="fedalt wants 2 clients or more, got 1"):
        fedalt.Federation(alone).run()
    assert not Path(tiny_config.out).exists()


FEDERATED = {"participation": 0.7, "stragglers": 0.5, "away": {"ann": (2,)}}


def cut_short(config, stopped_at=8):
    """Run, with Ctrl-C at that training step."""
    steps = []

    def step(self):
        steps.append(1)
        if len(steps) == stopped_at:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "step", step)
        with pytest.raises(KeyboardInterrupt):
            fedalt.Federation(config).run()


@pytest.mark.parametrize(
    ("method", "stopped_at"),
    [
        ("fedalt", 1),
        ("fedalt", 9),
        ("fedalt", 18),
        ("fedit", 9),
        ("fedit+ft", 9),
        ("fedalt-kept-optimizer", 9),
        ("flora", 9),
        ("fedalt with absent clients", 7),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(tiny_config, method, stopped_at, tmp_path):
    """Ctrl-C at a step of round 1, 2 or 3 (six steps each, four where one is absent)."""
    federation = FEDERATED if "absent" in method else {}
    config = quick(tiny_config, method=method.split()[0], rounds=3, **federation)
    uncut = replace(config, out=str(tmp_path / "uncut"))
    fedalt.Federation(uncut).run()
    cut_short(config, stopped_at)
    assert not (Path(config.out) / "results.json").exists()
    fedalt.Federation(config).run(resume=True)
    assert record_of(Path(config.out)) == record_of(Path(uncut.out))


def test_twenty_rounds_with_half_the_clients_two_bad_ones_and_three_kills_end_in_the_same_bits(
    tiny_config, tmp_path, capsys, monkeypatch
):
    """``bench.kill_resume`` kills a process with SIGKILL at random moments and resumes it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    names = ("ann", "bob", "cyd", "dan", "eve", "fay", "gil", "hal")
    for name in names[3:]:
        write_client(tmp_path / "data" / name, name[0], 4)
    path = tmp_path / "config.yaml"
    path.write_text(quick(tiny_config, rounds=20, participation=0.5).to_yaml())
    bad = ["--bad", "bob=nan", "--bad", "eve=huge"]
    out = tmp_path / "runs"
    assert kill_resume.main([str(path), "--kills", "3", "--out", str(out), *bad]) == 0
    assert "3 kills" in capsys.readouterr().out
    uncut, killed = record_of(out / "uncut"), record_of(out / "killed")
    assert killed == uncut
    assert {f"checkpoints/round-0020/clients/{name}.safetensors" for name in names} < uncut.keys()
    results = json.loads(uncut["results.json"])
    refused = {f["client"] for f in results["faults"] if f["event"] == "refuse"}
    assert refused == {"bob", "eve"}
    for name in names:
        assert (results["clients"][name]["trained_rounds"] > 0) == (name not in refused)


def test_a_resume_of_a_finished_run_changes_nothing(tiny_config):
    config = quick(tiny_config, rounds=1)
    fedalt.Federation(config).run()
    before = record_of(Path(config.out))
    fedalt.Federation(config).run(resume=True)
    assert record_of(Path(config.out)) == before


def test_a_resume_refuses_changed_data(tiny_config, tiny_data):
    config = quick(tiny_config, rounds=1)
    fedalt.Federation(config).run()
    path = tiny_data / "bob" / "train.jsonl"
    path.write_text(path.read_text().replace("say 1", "say 7"))
    with pytest.raises(fedalt.InputError, match="the data of bob is not what it was"):
        fedalt.Federation(config).run(resume=True)


def test_a_resume_refuses_a_changed_base(tiny_config, tiny_base, tmp_path):
    """Another base behind the same path: one weight of one layer differs."""
    from transformers import AutoModelForCausalLM

    moved = tmp_path / "base"
    os.symlink(tiny_base, moved)
    config = replace(
        quick(tiny_config, rounds=1), model=replace(tiny_config.model, path=str(moved))
    )
    fedalt.Federation(config).run()
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    moved.unlink()
    for path in tiny_base.iterdir():
        if path.name.startswith("tok"):
            (moved / path.name).parent.mkdir(exist_ok=True)
            (moved / path.name).write_bytes(path.read_bytes())
    model.save_pretrained(moved)
    with pytest.raises(fedalt.InputError, match="the base is not what it was"):
        fedalt.Federation(config).run(resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 3}, "lora.rank is 3 here and was 2"),
        ({"target_modules": ("v_proj",)}, r"lora.target_modules is \['v_proj'\] here and was"),
    ],
)
def test_a_changed_rank_or_target_is_refused(tiny_config, change, message):
    """On resume by the run's config; where that file was edited as well, by the checkpoint."""
    config = quick(tiny_config, rounds=1)
    fedalt.Federation(config).run()
    out = Path(config.out)
    other = replace(config, lora=replace(config.lora, **change))
    with pytest.raises(fedalt.InputError, match=message) as caught:
        fedalt.Federation(other).run(resume=True)
    assert str(caught.value).startswith(f"{out / 'config.yaml'}: ")
    (out / "config.yaml").write_text(other.to_yaml())
    with pytest.raises(fedalt.InputError, match=message) as caught:
        fedalt.Federation(other).run(resume=True)
    assert str(caught.value).startswith(f"{out / 'checkpoints' / 'round-0001'}: ")
    with pytest.raises(fedalt.InputError, match=message):
        fedalt.load_client(out, "bob")


def test_the_sample_runs_on_the_built_in_base(tmp_path):
    """One short round of the real thing, from the package's own files."""
    config = fedalt.load_config(
        None,
        (
            f"out={tmp_path / 'run'}",
            "rounds=1",
            "train.max_steps=2",
            "data.clients=[stock, diary]",
            "evaluate.max_new_tokens=12",
        ),
    )
    assert config.data.path == SAMPLE
    results = fedalt.Federation(config).run().results
    assert list(results["clients"]) == ["stock", "diary"]
    for client in results["clients"].values():
        assert client["last"]["loss"] < client["curve"][0]["loss"]
