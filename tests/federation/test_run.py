"""Whole runs on a tiny base: what each method leaves behind, and exact resume."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedalt
from fedalt.checkpoint import list_checkpoints, load_latest
from fedalt.client import derive_seed, train_client
from fedalt.config import SAMPLE
from fedalt.data.tokens import encode
from fedalt.journal import Progress
from fedalt.models import adapter_state, load_adapter_state, select
from fedalt.report import read_events
from fedalt.run import evaluate_run, load_model


def run(config, **changes):
    config = replace(config, **changes)
    fedalt.Federation(config).run()
    return load_latest(Path(config.out))


def part(state, name):
    """The named part with the part's name taken out of the tensors' names."""
    return {key.replace(f".{name}.", "."): tensor for key, tensor in select(state, name).items()}


def close(left, right):
    return left.keys() == right.keys() and all(
        torch.allclose(left[n].double(), right[n].double(), rtol=0, atol=1e-7) for n in left
    )


def average(states, weights):
    total = sum(weights)
    return {
        name: sum(w * s[name].double() for s, w in zip(states, weights, strict=True)) / total
        for name in states[0]
    }


def test_fedalt_leaves_each_client_the_mean_of_the_others(tiny_config):
    used = run(tiny_config).used
    own = {client: part(state, "individual") for client, state in used.items()}
    for client, state in used.items():
        others = [own[other] for other in own if other != client]
        assert close(part(state, "rest_of_world"), average(others, [1, 1]))
    assert not close(own["ann"], own["bob"])
    mixers = [select(state, "mixer") for state in used.values()]
    assert not close(mixers[0], mixers[1])


def test_the_first_round_is_the_clients_training_from_the_shared_start(tiny_config):
    """The loop adds nothing: one client trained by hand ends where the run says it did."""
    saved = run(tiny_config, rounds=1)
    model, tokenizer = load_model(tiny_config)
    start = adapter_state(model)
    clients = fedalt.data.load_clients(tiny_config.data, 0)
    load_adapter_state(model, start)
    train_client(
        model,
        encode(clients[1].train, tokenizer, tiny_config.data),
        tiny_config.train,
        seed=derive_seed(0, 1, "bob"),
        pad_id=tokenizer.pad_token_id,
    )
    by_hand = adapter_state(model)
    for name in ("individual", "mixer"):
        left, right = select(by_hand, name), select(saved.used["bob"], name)
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_fedit_leaves_all_clients_the_weighted_mean(tiny_config):
    local = run(tiny_config, rounds=1, method="local", out=tiny_config.out + "-local").used
    mean = run(tiny_config, rounds=1, method="fedit").used
    expected = average([local[c] for c in ("ann", "bob", "cyd")], [10, 6, 4])
    assert all(close(state, expected) for state in mean.values())


def test_fedit_ft_uses_the_local_state_and_goes_on_from_the_mean(tiny_config):
    fedit = run(tiny_config, method="fedit", out=tiny_config.out + "-fedit")
    tuned = run(tiny_config, method="fedit+ft")
    assert all(close(tuned.next[c], fedit.next[c]) for c in fedit.next)
    states = [tuned.used[c] for c in ("ann", "bob", "cyd")]
    assert close(average(states, [10, 6, 4]), fedit.next["ann"])
    assert not close(states[0], states[1])


def test_local_clients_never_meet(tiny_config):
    together = run(tiny_config, method="local").used["bob"]
    alone = replace(tiny_config, data=replace(tiny_config.data, clients=("bob",)))
    apart = run(alone, method="local", out=tiny_config.out + "-alone").used["bob"]
    assert all(torch.equal(together[name], apart[name]) for name in together)


def test_round_0_scores_the_base_and_results_hold_every_client(tiny_config):
    result = fedalt.Federation(tiny_config).run()
    events = read_events(Path(tiny_config.out) / "metrics.jsonl")
    rounds = [e["round"] for e in events if e["event"] == "evaluate" and e["client"] == "ann"]
    assert rounds == [0, 1, 2]
    written = json.loads((Path(tiny_config.out) / "results.json").read_text())
    assert written == result.results
    assert list(written["clients"]) == ["ann", "bob", "cyd"]
    ann = written["clients"]["ann"]
    assert ann["last"] == ann["curve"][-1]
    assert ann["best"]["rouge1"] == max(row["rouge1"] for row in ann["curve"])
    assert result.plot.stat().st_size > 5_000
    assert result.table.count("\n") == 5


def test_training_lowers_the_loss(tiny_config):
    config = replace(tiny_config, train=replace(tiny_config.train, max_steps=40))
    result = fedalt.Federation(config).run()
    for client in result.results["clients"].values():
        assert client["last"]["loss"] < client["curve"][0]["loss"] / 2


def test_a_client_can_be_loaded_again(tiny_config):
    result = fedalt.Federation(tiny_config).run()
    model, tokenizer = fedalt.load_client(result.out, "bob")
    inputs = tokenizer("say 1", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
    state, saved = adapter_state(model), load_latest(result.out).used["bob"]
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    with pytest.raises(fedalt.InputError, match="no client 'zoe'; known: ann, bob, cyd"):
        fedalt.load_client(result.out, "zoe")
    table = evaluate_run(result.out, client_id="bob")
    assert f"{result.results['clients']['bob']['last']['loss']:.3f}" in table


def test_a_lone_client_has_no_rest_of_world(tiny_config):
    alone = replace(tiny_config, data=replace(tiny_config.data, clients=("bob",)))
    with pytest.raises(fedalt.InputError, match="fedalt wants two clients or more, got 1"):
        fedalt.Federation(alone).run()
    assert not Path(tiny_config.out).exists()


def record_of(out: Path) -> dict[str, bytes]:
    """All that a resumed run must have in common with an uncut one: everything but the plot."""
    files = [*(list_checkpoints(out)[-1]).rglob("*.*"), *out.glob("*.json*"), out / "latest"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.mark.parametrize("method", ["fedalt", "fedit", "fedit+ft", "local"])
@pytest.mark.parametrize("stopped_at", [1, 14, 22])
def test_an_interrupted_run_resumes_to_the_same_bits(
    tiny_config, method, stopped_at, tmp_path, monkeypatch
):
    """Ctrl-C at a step of round 1, 2 and 3 (nine steps each), then a resume."""
    config = replace(tiny_config, method=method, rounds=3)
    uncut = replace(config, out=str(tmp_path / "uncut"))
    fedalt.Federation(uncut).run()
    steps = []

    def step(self):
        steps.append(1)
        if len(steps) == stopped_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", step)
        with pytest.raises(KeyboardInterrupt):
            fedalt.Federation(config).run()
    fedalt.Federation(config).run(resume=True)
    assert record_of(Path(config.out)) == record_of(Path(uncut.out))


def test_a_run_killed_anywhere_resumes_to_the_same_bits(tiny_config, tmp_path):
    """SIGKILL at ever later marks, resume each time, and compare all bytes with an uncut run."""
    config = replace(tiny_config, rounds=3)
    uncut = replace(config, out=str(tmp_path / "uncut"))
    fedalt.Federation(uncut).run()
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    command = [sys.executable, "-m", "fedalt", "run", str(path), "--resume"]
    out, kills = Path(config.out), 0
    rounds = [f"checkpoints/round-000{number}" for number in range(3)]
    for goal in ("config.yaml", "metrics.jsonl", *rounds):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (out / goal).exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 4
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    assert record_of(out) == record_of(Path(uncut.out))


def test_a_resume_of_a_finished_run_changes_nothing(tiny_config):
    fedalt.Federation(tiny_config).run()
    before = record_of(Path(tiny_config.out))
    fedalt.Federation(tiny_config).run(resume=True)
    assert record_of(Path(tiny_config.out)) == before


def test_a_resume_refuses_changed_data(tiny_config, tiny_data):
    fedalt.Federation(tiny_config).run()
    path = tiny_data / "bob" / "train.jsonl"
    path.write_text(path.read_text().replace("say 1", "say 7"))
    with pytest.raises(fedalt.InputError, match="the data of bob is not what it was"):
        fedalt.Federation(tiny_config).run(resume=True)


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
