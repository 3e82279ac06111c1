"""Clients that come after the training: where they start, how they fit in, and what stays as is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import fedalt
from fedalt.cli import main
from fedalt.model.states import adapter_alone, adapter_state, load_adapter_state, select
from fedalt.run.cohort import derive_seed, held_out
from fedalt.run.join import NEAREST, join_run, welcome
from fedalt.run.stage import set_stage
from fedalt.serving.clients import evaluate_run
from fedalt.store.checkpoint import Draft, StoredState, load_latest
from fedalt.training.client import train_client
from tests.conftest import write_client
from tests.run.test_run import average, close, part, quick, record_of, same, used
from tests.test_cli import refused, tree

JOIN = {"join_epochs": 1}


@pytest.fixture
def config(tiny_config):
    return quick(tiny_config, rounds=1, **JOIN)


@pytest.fixture
def finished(config):
    fedalt.Federation(config).run()
    return Path(config.out)


def joined(run_dir, client):
    return StoredState(run_dir / "joined" / f"{client}.safetensors").read()


def test_held_out_clients_take_no_part_and_join_at_the_end(tiny_config, tmp_path):
    config = quick(tiny_config, holdout=0.34, **JOIN)
    result = fedalt.Federation(config).run()
    (newcomer,) = held_out(["ann", "bob", "cyd"], config)
    known = [name for name in ("ann", "bob", "cyd") if name != newcomer]
    saved = load_latest(result.out)
    assert saved.record["clients"] == known == list(result.results["clients"])
    unseen = result.results["unseen"]["clients"]
    assert [row["round"] for row in unseen[newcomer]["curve"]] == [0, 1]
    assert newcomer in result.table
    # the run without that client at all is the same run
    alone = replace(config, data=replace(config.data, clients=tuple(known)))
    alone = quick(alone, out=tmp_path / "alone", holdout=0.0)
    fedalt.Federation(alone).run()
    expected = used(load_latest(Path(alone.out)))
    assert all(same(expected[name], state) for name, state in used(saved).items())


def test_a_newcomer_is_given_the_mean_of_all_and_fits_itself_in(config, finished, tmp_path):
    """By hand: the welcome, then one pass over its records with the seed of its own."""
    write_client(tmp_path / "late" / "zoe", "z", 4)
    assert main(["join", str(finished), "--data", str(tmp_path / "late" / "zoe")]) == 0
    after = joined(finished, "zoe")
    saved = load_latest(finished)
    own = [part(state, "individual") for state in used(saved).values()]
    assert close(part(after, "rest_of_world"), average(own, [1, 1, 1]))

    late = replace(config, data=replace(config.data, path=str(tmp_path / "late")))
    late = replace(late, federation=replace(late.federation, min_clients=2))
    write_client(tmp_path / "late" / "yan", "y", 4)  # a stage wants two
    stage = set_stage(late)
    zoe = next(member for member in stage.known if member.id == "zoe")
    load_adapter_state(stage.model, welcome(stage, saved, zoe))
    train_client(
        stage.model,
        stage.examples(zoe).train,
        replace(config.train, epochs=1, max_steps=None),
        stage.task.loss,
        trains=[("individual", "mixer")],
        seed=derive_seed(0, 2, "zoe"),
    )
    assert same(adapter_state(stage.model), after)


@pytest.mark.parametrize("start", ["fresh", "row", "nearest"])
def test_where_a_newcomers_individual_lora_starts(tiny_config, tmp_path, start):
    write_client(tmp_path / "data" / "dan", "d", 4)
    config = quick(tiny_config, holdout=0.25, join_start=start, **JOIN)
    config = replace(config, train=replace(config.train, max_steps=8, learning_rate=0.02))
    write_client(tmp_path / "data" / "eve", "e", 4)
    write_client(tmp_path / "data" / "fay", "f", 4)
    fedalt.Federation(config).run()
    saved = load_latest(Path(config.out))
    stage = set_stage(config)
    (newcomer,) = stage.unseen
    state = welcome(stage, saved, newcomer)
    individual = part(state, "individual")
    own = {name: part(s, "individual") for name, s in used(saved).items()}
    assert len(own) == 5
    row = average(list(own.values()), [1] * 5)
    assert close(part(state, "rest_of_world"), row)
    if start == "fresh":
        assert same(individual, part(stage.first_state(newcomer.id), "individual"))
    elif start == "row":
        assert close(individual, row)
    else:
        losses = {}
        for name, other in used(saved).items():
            load_adapter_state(stage.model, state | select(other, "individual"))
            with adapter_alone(stage.model, "individual"):
                batch = stage.examples(newcomer).train
                losses[name] = stage.task.loss(stage.model, batch).item()
        best = sorted(losses, key=losses.get)[:NEAREST]
        assert close(individual, average([own[name] for name in best], [1] * NEAREST))
        assert not close(individual, row)


def test_join_leaves_all_that_the_run_has_written_as_it_was(finished, tmp_path, capsys):
    before = tree(finished)
    for name in ("yan", "zoe"):
        write_client(tmp_path / "late" / name, name[0], 4)
    assert main(["join", str(finished), "--data", str(tmp_path / "late")]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("yan", "zoe"))
    assert "ann" not in printed
    after = tree(finished)
    assert after.items() > before.items()
    assert after.keys() - before.keys() == {
        f"joined/{name}.{kind}" for name in ("yan", "zoe") for kind in ("jsonl", "safetensors")
    }


def test_one_client_alone_may_be_named_by_its_own_folder_even_as_dot(
    finished, tmp_path, monkeypatch, capsys
):
    write_client(tmp_path / "late" / "zoe", "z", 4)
    write_client(tmp_path / "late" / "yan", "y", 4)
    monkeypatch.chdir(tmp_path / "late" / "zoe")
    assert main(["join", str(finished), "--data", "."]) == 0
    assert "zoe" in capsys.readouterr().out
    assert [path.name for path in sorted((finished / "joined").iterdir())] == [
        "zoe.jsonl",
        "zoe.safetensors",
    ]


def test_epochs_are_passes_over_the_newcomers_records(finished, tmp_path):
    write_client(tmp_path / "zoe", "z", 4)
    states = []
    for epochs in ("1", "3"):
        arguments = ["join", str(finished), "--data", str(tmp_path / "zoe"), "--epochs", epochs]
        assert main(arguments) == 0
        states.append(joined(finished, "zoe"))
        lines = (finished / "joined" / "zoe.jsonl").read_text()
        assert f'"round": {epochs}, "client": "zoe", "unseen": true' in lines
    assert not same(*states)


def test_a_joined_client_is_loaded_and_scored_like_any_other(finished, tmp_path, capsys):
    write_client(tmp_path / "late" / "zoe", "z", 4)
    assert main(["join", str(finished), "--data", str(tmp_path / "late")]) == 0
    capsys.readouterr()
    model, _ = fedalt.load_client(finished, "zoe")
    assert same(adapter_state(model), joined(finished, "zoe"))
    with pytest.raises(fedalt.InputError, match="no client 'x'; known: ann, bob, cyd, zoe"):
        fedalt.load_client(finished, "x")
    table = evaluate_run(finished, client_id="zoe", data=str(tmp_path / "late"))
    assert "zoe" in table
    assert main(["report", str(finished)]) == 0
    assert "zoe" in capsys.readouterr().out


def test_a_joined_file_that_is_no_safetensors_file_is_named(finished, tmp_path):
    (finished / "joined").mkdir()
    (finished / "joined" / "zoe.safetensors").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(fedalt.InputError, match=r"zoe\.safetensors: not a readable safetensors"):
        fedalt.load_client(finished, "zoe")


def test_what_cannot_join_is_refused_in_one_line(finished, tiny_data, tmp_path, capsys):
    before = tree(finished)
    join = ["join", finished, "--data"]
    message = refused([*join, tiny_data / "bob"], capsys)
    assert "knows the client 'bob'; rename the folder" in message
    assert "nowhere: no such folder" in refused([*join, tmp_path / "nowhere"], capsys)
    write_client(tmp_path / "zoe", "z", 4)
    message = refused([*join, tmp_path / "zoe", "--epochs", "x"], capsys)
    assert "--epochs: wants a whole number, got 'x'" in message
    message = refused([*join, tmp_path / "zoe", "--epochs", "0"], capsys)
    assert "federation.join_epochs must be at least 1, got 0" in message
    (tmp_path / "zoe" / "train.jsonl").write_text("{}\n")
    assert "zoe/train.jsonl:1: " in refused([*join, tmp_path / "zoe"], capsys)
    assert tree(finished) == before


def test_a_run_without_a_checkpoint_cannot_be_joined(config, tmp_path, capsys):
    out = Path(config.out)
    out.mkdir()
    (out / "config.yaml").write_text(config.to_yaml())
    write_client(tmp_path / "zoe", "z", 4)
    message = refused(["join", out, "--data", tmp_path / "zoe"], capsys)
    assert "no checkpoint yet; let round 0 finish first" in message
    message = refused(["join", tmp_path / "no", "--data", tmp_path / "zoe"], capsys)
    assert "no/config.yaml: cannot read the config" in message


def test_a_resume_of_a_finished_run_with_held_out_clients_changes_nothing(tiny_config):
    config = quick(tiny_config, holdout=0.34, **JOIN)
    fedalt.Federation(config).run()
    before = record_of(Path(config.out))
    assert sum(name.startswith("joined/") for name in before) == 2
    fedalt.Federation(config).run(resume=True)
    assert record_of(Path(config.out)) == before


def test_a_run_cut_short_while_a_held_out_client_fits_in_resumes_to_the_same_bits(
    tiny_config, tmp_path, monkeypatch
):
    config = quick(tiny_config, holdout=0.34, **JOIN)
    uncut = replace(config, out=str(tmp_path / "uncut"))
    fedalt.Federation(uncut).run()
    with monkeypatch.context() as patch:

        def stop(*arguments):
            raise KeyboardInterrupt

        patch.setattr("fedalt.run.join.write_state", stop)
        with pytest.raises(KeyboardInterrupt):
            fedalt.Federation(config).run()
    fedalt.Federation(config).run(resume=True)
    assert record_of(Path(config.out)) == record_of(Path(uncut.out))


def test_another_base_is_refused(config, finished, tiny_base, tmp_path):
    """A bit of its file is altered after the run: whoever takes the run up again is told so."""
    path = tiny_base / "model.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    write_client(tmp_path / "zoe", "z", 4)
    try:
        with pytest.raises(fedalt.InputError, match=r"not made on the base .*; restore"):
            join_run(finished, str(tmp_path / "zoe"))
        with pytest.raises(fedalt.InputError, match=r"not made on the base .*; restore"):
            fedalt.load_client(finished, "ann")
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_a_newcomer_that_fails_costs_nobody_elses_results(kind, tiny_config, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise kind("no luck")

    config = quick(tiny_config, holdout=0.34, **JOIN)
    with monkeypatch.context() as patch:
        patch.setattr("fedalt.run.join.train_client", broken)
        result = fedalt.Federation(config).run()
    (newcomer,) = held_out(["ann", "bob", "cyd"], config)
    assert newcomer not in result.results["clients"]
    assert len(result.results["clients"]) == 2
    (fault,) = result.results["faults"]
    assert (fault["client"], fault["reason"]) == (newcomer, f"{kind.__name__}: no luck")
    assert "could not join; see errors.log" in capsys.readouterr().err
    assert "no luck" in (result.out / "errors.log").read_text()
    assert evaluate_run(result.out).count("\n") == 3  # the two that there are
    again = fedalt.Federation(config).run(resume=True)  # once the cause is gone
    assert again.results["faults"] == []
    assert newcomer in again.results["unseen"]["clients"]
    assert newcomer in evaluate_run(result.out)


def test_without_a_rest_of_world_a_newcomer_keeps_what_it_was_given(tiny_config):
    """At round 0 there is none yet, and zeros on both sides would never train."""
    config = quick(tiny_config, holdout=0.34, join_start="row")
    stage = set_stage(config)
    (newcomer,) = stage.unseen
    draft = Draft(Path(config.out), 0)
    state = welcome(stage, draft.commit({"clients": []}, keep=1), newcomer)
    assert same(state, stage.first_state(newcomer.id))
    assert all(t.abs().max() > 0 for n, t in state.items() if n.endswith("individual.a"))


def test_a_save_cut_short_by_a_kill_counts_as_nothing(finished, tmp_path):
    (finished / "joined").mkdir()
    for kind in ("safetensors", "jsonl"):
        (finished / "joined" / f".draft-zoe.{kind}").write_bytes(b"{")
    assert evaluate_run(finished).count("\n") == 4
    write_client(tmp_path / "zoe", "z", 4)
    assert "zoe" in join_run(finished, str(tmp_path / "zoe"))


def test_a_newcomer_of_a_method_that_changes_the_base(config, tmp_path):
    """It joins the finished run only, on the base as the rounds have left it."""
    write_client(tmp_path / "zoe", "z", 4)
    config = replace(config, method="flora")
    fedalt.Federation(config).run()
    table = join_run(config.out, str(tmp_path / "zoe"))
    fresh = evaluate_run(config.out, "zoe", str(tmp_path))
    lines = (Path(config.out) / "joined" / "zoe.jsonl").read_text().splitlines()
    last = json.loads([line for line in lines if '"evaluate"' in line][-1])
    assert f"{last['loss']:.3f}" in fresh
    assert f"{last['loss']:.3f}" in table
    unfinished = replace(config, rounds=2).to_yaml()
    (Path(config.out) / "config.yaml").write_text(unfinished)
    with pytest.raises(fedalt.InputError, match="flora changes the base until round 2; join then"):
        join_run(config.out, str(tmp_path / "zoe"))
