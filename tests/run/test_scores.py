"""Clients scored in one pass over the base: what each would have got alone."""

from dataclasses import replace

import pytest
import torch

import fedalt
from fedalt.config import load_config
from fedalt.errors import InputError
from fedalt.evaluation import evaluate
from fedalt.model import INDIVIDUAL, REST_OF_WORLD, ClientRows, HiddenRows, adapter_state
from fedalt.run.scores import score_clients, scoring_groups
from fedalt.run.stage import set_stage
from tests.conftest import write_client
from tests.run.test_run import events_of, quick

PARTS = (INDIVIDUAL, REST_OF_WORLD)


def together(config, count, **changes):
    return replace(config, evaluate=replace(config.evaluate, together=count, **changes))


@pytest.fixture
def config(tiny_config, tmp_path):
    """Four clients of unequal sizes, whose batches hold less than two of them."""
    write_client(tmp_path / "data" / "dan", "d", 9)
    return together(quick(tiny_config), 4, batch_size=5)


def drawn(stage):
    """A state for every client, far from the base's answers."""
    torch.manual_seed(0)
    first = adapter_state(stage.model)
    return [
        {name: 0.1 * torch.randn_like(tensor) for name, tensor in first.items()}
        for _ in stage.known
    ]


@pytest.mark.parametrize("method", ["fedalt", "fedalt-scalar", "fedalt-half", "local"])
@pytest.mark.parametrize("beams", [1, 2])
def test_every_client_gets_what_it_gets_alone(config, method, beams):
    config = together(replace(config, method=method), 4, batch_size=5, num_beams=beams)
    stage = set_stage(config)
    stage.model.double()
    states, parts = drawn(stage), PARTS if method == "fedalt" else ()
    many = score_clients(stage, stage.known, states, parts, 2)
    assert {name: t.shape for name, t in adapter_state(stage.model).items()} == {
        name: t.shape for name, t in states[0].items()
    }
    for member, state, found in zip(stage.known, states, many, strict=True):
        (alone,) = score_clients(stage, [member], [state], parts, 2)
        assert found.kept == alone.kept
        assert found.scores == pytest.approx(alone.scores, rel=1e-12)  # fp64, some 10³ operations
        assert found.gates.keys() == alone.gates.keys()
        assert found.gates == pytest.approx(alone.gates, rel=1e-12)
        for part in parts:
            assert found.alone[part] == pytest.approx(alone.alone[part], rel=1e-12)
    losses = {found.scores["loss"] for found in many}
    assert len(losses) == 4


def test_questions_with_options_are_scored_beside_those_without(config, tmp_path):
    write_client(tmp_path / "data" / "eve", "e", 4)
    test = tmp_path / "data" / "eve" / "test.jsonl"
    lines = [
        f'{{"instruction": "which {n}", "output": "yes", "options": ["no", "yes", "no, never"]}}\n'
        for n in range(3)
    ]
    test.write_text("".join(lines))
    stage = set_stage(together(config, 5))
    stage.model.double()
    states = drawn(stage)
    many = score_clients(stage, stage.known, states)
    for member, state, found in zip(stage.known, states, many, strict=True):
        (alone,) = score_clients(stage, [member], [state])
        assert list(found.scores) == list(alone.scores)
        assert found.scores == pytest.approx(alone.scores, rel=1e-12)
    assert "choice" in many[-1].scores
    assert "choice" not in many[0].scores


def test_a_run_tells_what_one_by_one_does(config, tmp_path):
    alone = together(replace(config, out=str(tmp_path / "alone")), 1)
    for each in (config, alone):
        fedalt.Federation(each).run()
    for kind in ("evaluate", "gates", "part"):
        left, right = events_of(config, kind), events_of(alone, kind)
        assert [e["client"] for e in left] == [e["client"] for e in right]
    for left, right in zip(
        events_of(config, "evaluate"), events_of(alone, "evaluate"), strict=True
    ):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
    assert load_config(f"{config.out}/config.yaml").evaluate.together == 4


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(1, 5, [1, 1, 1, 1]), (3, 5, [3, 1]), (9, 5, [4]), ("auto", 128, [4]), ("auto", 1, [1] * 4)],
)
def test_who_shares_batches(config, count, batch_size, sizes):
    stage = set_stage(together(config, count, batch_size=batch_size))
    groups = list(scoring_groups(stage))
    assert [len(group) for group in groups] == sizes
    assert [member for group in groups for member in group] == list(stage.known)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), HiddenRows("rows")])
def test_where_many_cannot_go_they_go_one_by_one(config, error, monkeypatch):
    stage = set_stage(config)
    states = drawn(stage)
    wanted = score_clients(stage, stage.known, states)

    def refuse(self, clients):
        raise error

    monkeypatch.setattr(ClientRows, "of", refuse)
    found = score_clients(stage, stage.known, states)
    for left, right in zip(found, wanted, strict=True):
        assert left.scores == pytest.approx(right.scores, rel=1e-4)


def test_what_is_wrong_otherwise_is_not_tried_again(config, monkeypatch):
    stage = set_stage(config)

    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(evaluate, "generate", broken)
    with pytest.raises(RuntimeError, match="broken"):
        score_clients(stage, stage.known, drawn(stage))


@pytest.mark.parametrize("value", [0, 1.5, "all"])
def test_a_bad_number_is_refused_in_one_line(config, value):
    with pytest.raises(InputError, match=r"^evaluate\.together must be at least 1, or auto, got "):
        together(config, value)
