"""What a run says on standard error while it goes, and what it takes down for its report."""

from dataclasses import replace
from pathlib import Path

import pytest

import fedalt
from fedalt.cli import main
from fedalt.report.events import read_events, read_times
from fedalt.store import journal
from fedalt.store.journal import Progress, about
from tests.conftest import write_client
from tests.run.test_run import events_of, quick


def lines_of(capsys):
    """What reached standard error, without what loading a model says."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line and "Loading weights" not in line]


def test_the_first_line_says_what_is_about_to_be_run(tiny_config, capsys):
    config = quick(tiny_config, rounds=1)
    fedalt.Federation(config).run()
    first, second, *_ = lines_of(capsys)
    steps = config.train.max_steps
    assert first == f"3 clients, 1 round of {steps} steps, fedalt, on cpu -> {config.out}"
    assert second.startswith("round 0/1  rouge1 ")


def test_clients_may_differ_in_their_steps_and_be_held_out(tiny_config, tiny_data, capsys):
    write_client(tiny_data / "dan", "d", 9)
    config = quick(tiny_config, rounds=1)
    config = replace(
        config,
        train=replace(config.train, max_steps=None, epochs=1, batch_size=2),
        federation=replace(config.federation, holdout=0.25),
    )
    fedalt.Federation(config).run()
    first = lines_of(capsys)[0]
    train = [
        len((tiny_data / client / "train.jsonl").read_text().splitlines())
        for client in {e["client"] for e in events_of(config, "train")}
    ]
    least, most = -(-min(train) // 2), -(-max(train) // 2)
    assert least < most
    assert first.startswith(f"3 clients and 1 held out, 1 round of {least} to {most} steps, ")


def test_a_resume_says_from_where_and_a_finished_run_nothing(tiny_config, capsys):
    config = quick(tiny_config, rounds=2)
    result = fedalt.Federation(config).run()
    assert len(read_times(result.out / "times.jsonl")) > 0
    capsys.readouterr()
    fedalt.Federation(config).run(resume=True)
    assert lines_of(capsys) == []
    starts = [row for row in read_times(result.out / "times.jsonl") if row["phase"] == "start"]
    assert [row["round"] for row in starts] == [0]
    assert set(starts[0]) >= {"date", "device", "python", "fedalt", "torch", "transformers"}


def test_round_lines_tell_how_long_it_will_still_take(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    progress = Progress(rounds=4, steps_a_round=2, done=0)
    with progress:
        for number, took in enumerate((5.0, 60.0, 100.0, 80.0, 50.0)):
            now[0] += took
            progress.end_round(number)
    lines = lines_of(capsys)
    assert lines == [
        "round 0/4  5.0 s",
        "round 1/4  train loss -  60.0 s  about 3 min left",
        "round 2/4  train loss -  100.0 s  about 3 min left",  # twice 80 s
        "round 3/4  train loss -  80.0 s  about 1 min left",
        "round 4/4  train loss -  50.0 s",
    ]


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.2, "about 1 s"), (59, "about 59 s"), (150, "about 2 min"), (9000, "about 2.5 h")],
)
def test_times_are_guessed_as_people_say_them(seconds, told):
    assert about(seconds) == told


def test_the_table_and_the_verdict_fit_a_terminal_whatever_the_clients_are_called(
    tiny_config, tiny_data, capsys
):
    name = "a-client-of-which-the-name-is-much-longer-than-anyone-would-like-it-to-be"
    (tiny_data / "ann").rename(tiny_data / name)
    config = quick(tiny_config, rounds=1)
    path = Path(config.out).with_suffix(".yaml")
    path.write_text(config.to_yaml())
    assert main(["run", str(path)]) == 0
    *told, report = capsys.readouterr().out.splitlines()
    assert max(map(len, told)) <= 80
    assert "mixed" in told[0]
    assert any("By ROUGE-1, mixed" in line for line in told)
    assert name in Path(report.removeprefix("report: ")).read_text("utf-8")
    assert name in Path(config.out, "report", "clients.md").read_text("utf-8")


def test_answers_are_kept_at_the_beginning_and_the_end_with_each_ones_score(tiny_config):
    config = quick(tiny_config, rounds=2)
    result = fedalt.Federation(config).run()
    answers = events_of(config, "answers")
    assert [(e["round"], e["client"]) for e in answers] == [
        (number, client) for number in (0, 2) for client in ("ann", "bob", "cyd")
    ]
    scored = {(e["round"], e["client"]): e for e in events_of(config, "evaluate")}
    for event in answers:
        mean = sum(event["scores"]) / event["test"]
        assert mean == pytest.approx(scored[event["round"], event["client"]]["rouge1"], abs=0.01)
        test = read_events(Path(config.data.path, event["client"], "test.jsonl"))
        assert event["test"] == len(event["scores"]) == len(test)
        assert [shown["gold"] for shown in event["shown"]] == [row["output"] for row in test][:5]
        client = result.results["clients"][event["client"]]
        assert client["records"] == {"train": event["train"], "test": event["test"]}
        low, high = client["interval"]
        assert low <= client["last"]["rouge1"] <= high
    page = (result.out / "report" / "report.html").read_text("utf-8")
    assert "<h2>Questions and answers</h2>" in page
