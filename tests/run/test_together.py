"""The loop with clients that train together: the same run, whatever befalls a group."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedalt
from fedalt.config.schema import Config, PrivacyConfig
from fedalt.evaluation.tasks import TextTask
from fedalt.model.grouped import ClientRows, HiddenRows
from fedalt.run import turns
from fedalt.run.groups import Groups
from fedalt.run.stage import set_stage
from fedalt.training.together import NotTogether
from tests.conftest import write_client
from tests.run.test_run import (
    FEDERATED,
    cut_short,
    events_of,
    quick,
    record_of,
    run,
    same,
    used,
)

NAMES = ("ann", "bob", "cyd", "dan")


@pytest.fixture
def config(tiny_config, tmp_path):
    """Four clients, two steps a round; all of them together."""
    write_client(tmp_path / "data" / "dan", "d", 4)
    return together(quick(tiny_config), 4)


def together(config, count, **train):
    return replace(config, train=replace(config.train, together=count, **train))


def test_a_run_repeats_bit_for_bit(config, tmp_path):
    again = replace(config, out=str(tmp_path / "again"))
    fedalt.Federation(config).run()
    fedalt.Federation(again).run()
    left, right = record_of(Path(config.out)), record_of(Path(again.out))
    assert {name for name in left if left[name] != right[name]} <= {
        name for name in left if name.endswith("manifest.json")
    }


def test_a_run_tells_what_one_by_one_does(config, tmp_path):
    """The same events in the same order, and losses that differ by single precision alone."""
    alone = together(replace(config, out=str(tmp_path / "alone")), 1)
    fedalt.Federation(config).run()
    fedalt.Federation(alone).run()
    for kind in ("train", "traffic", "evaluate"):
        left, right = events_of(config, kind), events_of(alone, kind)
        names = [(e["round"], e["client"]) for e in left]
        assert names == [(e["round"], e["client"]) for e in right]
    for left, right in zip(events_of(config, "train"), events_of(alone, "train"), strict=True):
        assert left["steps"] == right["steps"]
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("method", "stopped_at"),
    [("fedalt", 3), ("fedalt-kept-optimizer", 13), ("fedit", 20), ("fedalt with absent ones", 7)],
)
def test_an_interrupted_run_resumes_to_the_same_bits(config, method, stopped_at, tmp_path):
    federation = FEDERATED if "absent" in method else {}
    federation = replace(config.federation, **federation)
    config = replace(config, method=method.split()[0], rounds=3, federation=federation)
    uncut = replace(config, out=str(tmp_path / "uncut"))
    fedalt.Federation(uncut).run()
    cut_short(config, stopped_at)
    fedalt.Federation(config).run(resume=True)
    assert record_of(Path(config.out)) == record_of(Path(uncut.out))


def spoil(monkeypatch, letter, how):
    """Change the losses of the client whose answers are that letter."""
    honest = TextTask.losses

    def losses(self, model, batch):
        own = [self.tool.decode(example.answer)[:1] == letter for example in batch]
        return how(honest(self, model, batch), torch.tensor(own))

    monkeypatch.setattr(TextTask, "losses", losses)


def test_a_client_of_no_number_is_refused_and_leaves_the_others_their_bits(
    config, monkeypatch, tmp_path
):
    config = replace(config, rounds=1, method="local")
    clean = used(run(replace(config, out=str(tmp_path / "clean"))))
    spoil(monkeypatch, "b", lambda losses, own: losses * torch.where(own, torch.nan, 1.0))
    spoilt = used(run(config))
    (refused,) = events_of(config, "refuse")
    assert refused["client"] == "bob"
    assert "NaN" in refused["reason"]
    for name in ("ann", "cyd", "dan"):
        assert same(spoilt[name], clean[name])
    assert not same(spoilt["bob"], clean["bob"])


def limited(monkeypatch, most, error):
    """More examples at once than so many do not go."""
    honest = TextTask.losses

    def losses(self, model, batch):
        if len(batch) > most:
            raise error
        return honest(self, model, batch)

    monkeypatch.setattr(TextTask, "losses", losses)


@pytest.mark.parametrize(("most", "fits"), [(4, 2), (3, 1)])
def test_where_memory_runs_out_a_group_is_halved(config, most, fits, monkeypatch, tmp_path, capsys):
    """Batches of two: 4 examples are two clients, 3 are one; the number is kept for a resume."""
    as_many = used(run(together(replace(config, out=str(tmp_path / "as-many")), fits)))
    limited(monkeypatch, most, torch.OutOfMemoryError("out of memory"))
    saved = run(config)
    assert saved.record["together"] == fits
    assert all(same(state, as_many[name]) for name, state in used(saved).items())
    told = capsys.readouterr().err
    assert told.count("4 clients not trained together: out of memory") == 1


def test_a_client_that_raises_fails_alone(config, monkeypatch):
    config = replace(config, rounds=1)

    def fail(losses, own):
        if own.any():
            raise ValueError("a broken record")
        return losses

    spoil(monkeypatch, "b", fail)
    honest = turns.train_client

    def train(model, examples, *args, **kwargs):
        if len(examples) == 6:
            raise ValueError("a broken record")
        return honest(model, examples, *args, **kwargs)

    monkeypatch.setattr("fedalt.run.turns.train_client", train)
    run(config)
    assert [event["client"] for event in events_of(config, "fail")] == ["bob"]
    assert {event["client"] for event in events_of(config, "train")} == {"ann", "cyd", "dan"}


@pytest.mark.parametrize("error", [HiddenRows("no"), NotTogether()], ids=["hidden", "unreached"])
def test_a_model_that_does_not_allow_it_trains_one_by_one(
    config, error, monkeypatch, tmp_path, capsys
):
    alone = used(run(together(replace(config, out=str(tmp_path / "alone")), 1)))

    def hidden(self, x):
        raise error

    monkeypatch.setattr(ClientRows, "__call__", hidden)
    capsys.readouterr()
    ends = used(run(config))
    assert capsys.readouterr().err.count("clients train one by one") == 1
    assert all(same(ends[name], state) for name, state in alone.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"train": {"packing": True}},
        {"train": {"micro_batch": 2}},
        {"lora": {"modules_to_save": ("lm_head",)}},
        {"privacy": {"record_clip": 1.0}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_does_not_go_together_is_refused_or_left_to_auto(tiny_config, settings):
    def made(count):
        train = {**settings.get("train", {}), "together": count}
        return replace(
            tiny_config,
            train=replace(tiny_config.train, **train),
            lora=replace(tiny_config.lora, **settings.get("lora", {})),
            privacy=PrivacyConfig(**settings.get("privacy", {})),
        )

    key = next(iter(settings))
    wanted = f"{key}.{next(iter(settings[key]))}"
    with pytest.raises(
        fedalt.InputError, match=rf"train\.together must be 1 or auto with {wanted}"
    ):
        made(8)
    assert made("auto").trains_alone == made(1).trains_alone == wanted


def test_auto_leaves_those_that_cannot_go_together_alone(tiny_config):
    stage = set_stage(together(tiny_config, "auto", micro_batch=2))
    assert [len(group) for group in Groups(stage).of(stage.known)] == [1, 1, 1]


@pytest.mark.parametrize("value", [0, True, "all", -1])
def test_a_number_that_is_none_is_refused(value):
    with pytest.raises(fedalt.InputError, match=r"train\.together must be at least 1, or auto"):
        together(Config(), value)


class Plain:
    """A stage of clients whose records are as long as they say."""

    def __init__(self, lengths, count, ranks=(), batch_size=2):
        self.config = together(Config(), count, batch_size=batch_size)
        self.model, self.task, self._ranks = torch.nn.Linear(1, 1), self, dict(ranks)
        self.known = [Known(name, length) for name, length in lengths.items()]

    def trains(self, client):
        return [("individual",)]

    def rank(self, client):
        return self._ranks.get(client, 8)

    def examples(self, member):
        return member

    def length(self, example):
        return example

    def names(self, most=None):
        return [[m.id for m in group] for group in Groups(self, most).of(self.known)]


class Known:
    def __init__(self, name, length):
        self.id, self.train = name, [length - 1, length + 1]


LENGTHS = {"a": 10, "b": 40, "c": 11, "d": 45, "e": 12}


def test_those_of_like_lengths_go_together():
    assert Plain(LENGTHS, 8).names() == [["a", "c", "e"], ["b", "d"]]
    assert Plain(LENGTHS, 2).names() == [["a", "c"], ["e"], ["b", "d"]]
    assert Plain(LENGTHS, 8).names(most=2) == [["a", "c"], ["e"], ["b", "d"]]
    assert Plain(LENGTHS, 1).names() == Plain(LENGTHS, 8).names(most=1) == [[c] for c in LENGTHS]


def test_those_of_another_rank_do_not():
    names = Plain(LENGTHS, 8, ranks={"c": 4, "e": 4}).names()
    assert names == [["a"], ["b", "d"], ["c", "e"]]


def test_groups_are_of_similar_sizes():
    names = Plain({str(n): 10 for n in range(9)}, 8).names()
    assert [len(group) for group in names] == [5, 4]


def test_auto_fills_a_pass_and_no_more():
    """On a CPU 512 tokens: 5 clients of 2 records of 45."""
    alike = {str(n): 45 for n in range(10)}
    assert [len(group) for group in Plain(alike, "auto").names()] == [5, 5]
    assert [len(group) for group in Plain(alike, "auto", batch_size=16).names()] == [1] * 10
