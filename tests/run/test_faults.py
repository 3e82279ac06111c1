"""Bad clients: their updates are refused, those that raise lose that round only, all goes on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedalt
from fedalt.cli import main
from fedalt.evaluation.tasks import TextTask
from fedalt.run import turns
from fedalt.store.checkpoint import load_checkpoint
from tests.conftest import write_client
from tests.run.test_run import average, close, events_of, part, quick, run, same, used

NAMES = ("ann", "bob", "cyd", "dan")


@pytest.fixture
def config(tiny_config, tmp_path):
    write_client(tmp_path / "data" / "dan", "d", 4)
    return quick(tiny_config)


def first(update):
    return sorted(update)[0]


def one(update, change):
    """``update`` with its first tensor changed."""
    return {**update, first(update): change(update[first(update)].clone())}


def fill(number):
    def change(tensor):
        tensor[0, 0] = number
        return tensor

    return change


BAD = {
    "nan": (lambda u: one(u, fill(torch.nan)), "individual.a holds NaN"),
    "inf": (lambda u: one(u, fill(-torch.inf)), "individual.a holds an infinite number"),
    "shape": (lambda u: one(u, lambda t: t[:1]), r"individual.a has shape (1, 32), wanted (2, 32)"),
    "dtype": (lambda u: one(u, lambda t: t.double()), "is torch.float64, wanted torch.float32"),
    "key missing": (lambda u: {n: u[n] for n in sorted(u)[1:]}, "individual.a is missing"),
    "key unknown": (lambda u: {**u, "mixer": torch.ones(1)}, "mixer is not known here"),
    "nothing": (lambda u: {}, "individual.a is missing"),
    "norm": (lambda u: {n: 1000 * (t + 1) for n, t in u.items()}, "more than 10 times the median"),
}


@pytest.fixture
def spoilt(monkeypatch):
    """Have a client's hand-ins spoilt, in every round or in some."""

    def spoil(client, how, only=()):
        honest, calls = turns.hand_in, []

        def hand_in(state, parts, name):
            update = honest(state, parts, name)
            if name != client:
                return update
            calls.append(1)
            return how(update) if not only or len(calls) in only else update

        monkeypatch.setattr("fedalt.run.turns.hand_in", hand_in)

    return spoil


@pytest.mark.parametrize("case", BAD)
def test_a_bad_update_is_refused_and_the_round_is_the_one_without_that_client(
    config, case, spoilt, tmp_path
):
    """The same as if the client had been away, in whose place nobody else was drawn."""
    how, reason = BAD[case]
    without = replace(
        config,
        out=str(tmp_path / "without"),
        federation=replace(config.federation, away={"bob": (2,)}),
    )
    expected = run(without)
    spoilt("bob", how, only=(2,))
    saved = run(config)

    assert saved.record["sent"] == expected.record["sent"] == {**dict.fromkeys(NAMES, 2), "bob": 1}
    for name in NAMES:
        assert same(saved.used(name).read(), expected.used(name).read())
    before = load_checkpoint(saved.path.with_name("round-0001")).used("bob").read()
    assert same(part(saved.used("bob").read(), "individual"), part(before, "individual"))

    (event,) = events_of(config, "refuse")
    assert (event["round"], event["client"]) == (2, "bob")
    assert reason in event["reason"]
    results = fedalt.Federation(config).run(resume=True).results
    assert {n: results["clients"][n]["refused"] for n in NAMES} == {n: n == "bob" for n in NAMES}
    assert results["faults"] == [
        {"round": 2, "client": "bob", "event": "refuse", "reason": event["reason"]}
    ]
    assert "refused" in Path(config.out, "report", "report.html").read_text()


def test_a_client_refused_from_the_start_never_counts(config, spoilt):
    spoilt("bob", BAD["nan"][0])
    saved = run(config)
    assert sorted(saved.record["sent"]) == ["ann", "cyd", "dan"]
    own = {name: part(saved.used(name).read(), "individual") for name in NAMES}
    row = part(saved.used("ann").read(), "rest_of_world")
    assert close(row, average([own["cyd"], own["dan"]], [1, 1]))


def test_a_refused_clients_optimizer_goes_back_with_its_state(config, spoilt, tmp_path):
    """It is refused once all have sent, when its moments are long made."""
    config = replace(config, method="fedalt-kept-optimizer", rounds=1)
    away = replace(config.federation, away={"bob": (1,)})
    expected = run(config, federation=away, out=str(tmp_path / "without"))
    spoilt("bob", BAD["norm"][0])
    saved = run(config)
    assert len(saved.state("optimizer", "ann").read()) > 0
    assert same(saved.state("optimizer", "bob").read(), expected.state("optimizer", "bob").read())


def test_without_a_limit_on_norms_a_large_update_counts(config, spoilt):
    spoilt("bob", BAD["norm"][0])
    free = replace(config, rounds=1, federation=replace(config.federation, max_norm_ratio=None))
    saved = run(free)
    assert saved.record["sent"]["bob"] == 1
    row = part(saved.used("ann").read(), "rest_of_world")
    assert max(float(tensor.abs().max()) for tensor in row.values()) > 100


def test_of_two_clients_none_is_out_of_proportion(config, spoilt):
    """Nobody can say which of the two is the odd one."""
    config = replace(config, data=replace(config.data, clients=("ann", "bob")), rounds=1)
    spoilt("bob", BAD["norm"][0])
    assert run(config).record["sent"] == {"ann": 1, "bob": 1}


class Odd(Exception):
    """None of the usual kinds."""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert\nand more lines"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        Odd("odd"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_client_that_raises_in_its_training_loses_that_round_only(
    config, error, monkeypatch, tmp_path
):
    """bob raises at his third step of round 1; the others and the next round are untouched.

    Where memory runs out the step is run again with one of its two records, which fails as well.
    """
    config = replace(config, train=replace(config.train, max_steps=4))
    away = replace(config.federation, away={"bob": (1,)})
    expected = run(config, federation=away, out=str(tmp_path / "without"))
    loss, seen = TextTask.loss, []

    def failing(self, model, batch):
        if model.training:
            seen.append(1)
            again = isinstance(error, torch.OutOfMemoryError | MemoryError)
            if len(seen) in (4 + 3, 4 + 4 if again else 0):  # ann's four, then bob's third
                loss(self, model, batch).backward()  # leaves gradients behind
                raise error
        return loss(self, model, batch)

    monkeypatch.setattr(TextTask, "loss", failing)
    saved = run(config)
    for name in NAMES:
        assert same(saved.used(name).read(), expected.used(name).read())
    assert saved.record["sent"] == dict.fromkeys(NAMES, 2)

    (event,) = events_of(config, "fail")
    told = "".join(f": {line}" for line in str(error).splitlines()[:1])
    assert event["reason"] == f"{type(error).__name__}{told}"
    assert (event["round"], event["client"]) == (1, "bob")
    log = Path(config.out, "errors.log").read_text()
    assert log.count("Traceback") == 1
    assert "in failing" in log
    results = fedalt.Federation(config).run(resume=True).results
    assert results["clients"]["bob"]["failed"] == 1
    assert results["clients"]["bob"]["trained_rounds"] == 1
    assert [fault["event"] for fault in results["faults"]] == ["fail"]


def test_where_all_clients_fail_the_run_ends_with_one_line_and_status_1(
    config, tmp_path, monkeypatch, capsys
):
    def failing(self, model, batch):
        raise MemoryError("no more")

    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    with monkeypatch.context() as patch:
        patch.setattr(TextTask, "loss", failing)
        assert main(["run", str(path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    reason = "ann: MemoryError: no more; see errors.log"
    assert lines[-1] == f"fedalt: round 1: no client could train; {reason}"
    assert not any("Traceback" in line for line in lines)
    assert Path(config.out, "errors.log").read_text().count("MemoryError: no more") == 4
    assert not Path(config.out, "results.json").exists()
    assert main(["run", "--out", config.out, "--resume"]) == 0  # once the cause is gone


def test_a_client_that_cannot_be_scored_is_told_and_the_rest_goes_on(config, monkeypatch):
    """bob needs too much memory in round 2, after the others have trained beside him."""
    evaluate, seen = TextTask.evaluate, []

    def failing(self, model, clients, meter=None, rows=None):
        seen.append(1)
        if len(seen) == len(NAMES) + 3 + 1:  # round 0, then all three scores of ann's
            raise torch.OutOfMemoryError("CUDA out of memory")
        return evaluate(self, model, clients, meter, rows)

    monkeypatch.setattr(TextTask, "evaluate", failing)
    results = fedalt.Federation(config).run().results
    (fault,) = results["faults"]
    assert (fault["round"], fault["client"]) == (2, "bob")
    assert [results["clients"][name]["curve"][-1]["round"] for name in NAMES] == [2, 0, 2, 2]


def test_where_the_first_scores_need_too_much_memory_the_cure_is_named(config, monkeypatch, capsys):
    def failing(self, model, clients, meter=None, rows=None):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TextTask, "evaluate", failing)
    with pytest.raises(fedalt.errors.RunFailed, match=r"lower evaluate.batch_size \(128\)"):
        fedalt.Federation(config).run()


def test_a_run_without_one_good_update_fails_after_its_report(config):
    wild = replace(config, train=replace(config.train, learning_rate=1e38, max_steps=3))
    wild = replace(wild, federation=replace(wild.federation, participation=0.5))
    with pytest.raises(
        fedalt.errors.RunFailed, match="no update was good in any round; the report"
    ):
        fedalt.Federation(wild).run()
    assert (Path(config.out) / "report" / "report.html").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_not_a_clients_fault(config, error, monkeypatch):
    def stop(self, model, batch):
        raise error

    monkeypatch.setattr(TextTask, "loss", stop)
    with pytest.raises(error):
        fedalt.Federation(replace(config, evaluate=replace(config.evaluate, every=9))).run()
    assert not Path(config.out, "errors.log").exists()


def test_an_update_that_diverged_by_itself_is_refused_with_its_client_unharmed(config):
    """A learning rate of 1e38 in earnest: no patch; all diverge, so the run ends."""
    wild = replace(config, train=replace(config.train, learning_rate=1e38, max_steps=3))
    reason = "round 1: no client could train; ann: .* holds NaN"
    with pytest.raises(fedalt.errors.RunFailed, match=reason):
        fedalt.Federation(wild).run()
    saved = load_checkpoint(Path(config.out, "checkpoints", "round-0000"))
    assert all(t.isfinite().all() for state in used(saved).values() for t in state.values())


ROBUST = {
    "median": lambda others: others.sort(0).values[1:3].mean(0),
    "trimmed": lambda others: others.sort(0).values[1:3].mean(0),
}


@pytest.mark.parametrize("aggregate", ROBUST)
def test_a_robust_average_ignores_one_poisoned_client(config, aggregate, spoilt, tmp_path):
    """Five clients: of the four others' values, one thrown far off, the middle two's mean."""
    write_client(tmp_path / "data" / "eve", "e", 4)
    settings = {"aggregate": aggregate, "trim": 0.25, "max_norm_ratio": None}
    robust = replace(config, rounds=1, federation=replace(config.federation, **settings))
    spoilt("bob", lambda update: {n: 1e6 * (t + 1) for n, t in update.items()})
    saved = run(robust)
    own = {name: part(saved.used(name).read(), "individual") for name in saved.record["clients"]}
    row = part(saved.used("ann").read(), "rest_of_world")
    for name, tensor in row.items():
        values = {n: own[n][name].double() for n in own}
        values["bob"] = 1e6 * (values["bob"] + 1)  # what he handed in
        others = torch.stack([values[n] for n in ("bob", "cyd", "dan", "eve")])
        assert torch.allclose(tensor.double(), ROBUST[aggregate](others), rtol=0, atol=1e-6)
        assert tensor.abs().max() < 10
    mean = replace(robust, federation=replace(robust.federation, aggregate="mean"))
    moved = run(mean, out=str(tmp_path / "mean")).used("ann").read()
    assert max(float(t.abs().max()) for t in part(moved, "rest_of_world").values()) > 1e5


def test_a_clipped_average_scales_a_large_change_to_the_median_norm(config, spoilt, tmp_path):
    settings = {"aggregate": "clipped", "max_norm_ratio": None}
    clipped = replace(config, rounds=1, federation=replace(config.federation, **settings))
    spoilt("bob", lambda update: {n: t + 1000 for n, t in update.items()})
    saved = run(clipped)
    start = load_checkpoint(saved.path.with_name("round-0000"))
    change = {}
    for name in NAMES:
        before = part(start.used(name).read(), "individual")
        after = part(saved.used(name).read(), "individual")
        shift = 1000 if name == "bob" else 0  # of what he handed in
        change[name] = {n: after[n].double() + shift - before[n].double() for n in after}
    norms = {
        name: sum(float(t.square().sum()) for t in delta.values()) ** 0.5
        for name, delta in change.items()
    }
    middle = sum(sorted(norms.values())[1:3]) / 2
    assert norms["bob"] > 1000 * middle
    factor = {name: min(1.0, middle / norm) for name, norm in norms.items()}
    before = part(start.used("ann").read(), "individual")
    expected = {
        n: before[n].double() + sum(factor[o] * change[o][n] for o in NAMES[1:]) / 3 for n in before
    }
    row = part(saved.used("ann").read(), "rest_of_world")
    assert all(torch.allclose(row[n].double(), expected[n], rtol=0, atol=1e-4) for n in row)
