"""Events in, results and tables out; every number here is worked out by hand."""

import csv
import io
import json
import sys

import pytest

from fedalt.errors import InputError
from fedalt.report.client_sheets import client_csv, client_table, unseen_table
from fedalt.report.events import read_events, read_times
from fedalt.report.report import write_report
from fedalt.report.summary import read_results, summarise
from fedalt.report.tables import duration, mib, spread_of


def scored(number, client, rouge1, loss=1.0, **more):
    return {
        "event": "evaluate",
        "round": number,
        "client": client,
        "rouge1": rouge1,
        "exact_match": rouge1 / 2,
        "loss": loss,
        **more,
    }


EVENTS = [
    scored(0, "ann", 10.0),
    scored(0, "bob", 20.0),
    {"event": "train", "round": 1, "client": "ann", "loss": 0.5, "steps": 3},
    {"event": "traffic", "round": 1, "client": "ann", "sent": 2**20, "received": 2**19},
    {"event": "traffic", "round": 1, "client": "bob", "sent": 2**20, "received": 0},
    scored(1, "ann", 60.0),
    scored(1, "bob", 40.0),
    {"event": "refuse", "round": 2, "client": "ann", "reason": "not finite"},
    {"event": "late", "round": 2, "client": "ann"},
    {"event": "traffic", "round": 2, "client": "bob", "sent": 100, "received": 24},
    scored(2, "ann", 50.0),
    scored(2, "bob", 80.0, loss=0.25),
]
PARTS = [
    {"event": "part", "round": 2, "client": c, "part": part, "rouge1": value, "loss": 2.0}
    for c, part, value in (
        ("ann", "individual", 45.0),
        ("bob", "individual", 70.0),
        ("ann", "rest_of_world", 30.0),
        ("bob", "rest_of_world", 20.0),
    )
]
GATES = [
    {"event": "gates", "round": 2, "client": "ann", "layers": {"0.q": 0.25, "1.q": 0.75}},
    {"event": "gates", "round": 2, "client": "bob", "layers": {"0.q": 0.5, "1.q": 0.7}},
]
UNSEEN = [
    {"event": "join", "round": 2, "client": "cyd"},
    scored(0, "cyd", 30.0, unseen=True),
    scored(3, "cyd", 90.0, unseen=True),
]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_last_and_best_are_kept_apart():
    results = summarise(EVENTS)
    assert results["metric"] == "rouge1"
    assert results["round"] == 2
    ann, bob = results["clients"]["ann"], results["clients"]["bob"]
    assert (ann["last"]["rouge1"], ann["best"]["rouge1"], ann["best"]["round"]) == (50, 60, 1)
    assert bob["last"] == bob["best"] == bob["curve"][2]
    assert results["mean"]["base"] == {"rouge1": 15, "exact_match": 7.5, "loss": 1}
    assert results["mean"]["last"] == {"rouge1": 65, "exact_match": 32.5, "loss": 0.625}
    assert results["mean"]["best"]["rouge1"] == 70
    assert results["worst"] == {"client": "ann", "value": 50}
    assert results["spread"] == 15


def test_traffic_and_faults_are_counted():
    results = summarise([*EVENTS, {"event": "thin", "round": 3, "client": "", "reason": "1 of 2"}])
    ann, bob = results["clients"]["ann"], results["clients"]["bob"]
    assert (ann["sent"], ann["received"], ann["trained_rounds"]) == (2**20, 2**19, 1)
    assert (ann["refused"], ann["failed"], ann["late"]) == (1, 0, 1)
    assert (bob["sent"], bob["refused"]) == (2**20 + 100, 0)
    assert results["traffic"] == {"sent": 2**21 + 100, "received": 2**19 + 24}
    assert [row["bytes"] for row in results["curve"]] == [0, 5 * 2**19, 5 * 2**19 + 124]
    assert [row["rouge1"] for row in results["curve"]] == [15, 50, 65]
    assert results["faults"] == [
        {"round": 2, "client": "ann", "event": "refuse", "reason": "not finite"},
        {"round": 2, "client": "ann", "event": "late", "reason": ""},
        {"round": 3, "client": "", "event": "thin", "reason": "1 of 2"},
    ]
    assert list(results["clients"]) == ["ann", "bob"]


def test_adapters_alone_and_gates_are_by_client():
    results = summarise([*EVENTS, *PARTS, *GATES])
    ann = results["clients"]["ann"]
    assert ann["individual"] == {"rouge1": 45, "loss": 2}
    assert ann["rest_of_world"] == {"rouge1": 30, "loss": 2}
    assert ann["gates"] == {"0.q": 0.25, "1.q": 0.75}
    assert results["mean"]["individual"]["rouge1"] == 57.5
    assert results["mean"]["rest_of_world"]["rouge1"] == 25
    assert "individual" not in summarise(EVENTS)["clients"]["ann"]


def test_unseen_clients_never_enter_the_means():
    results, before = summarise([*EVENTS, *UNSEEN]), summarise(EVENTS)
    unseen = results.pop("unseen")
    assert results == before
    assert list(unseen["clients"]) == ["cyd"]
    assert unseen["mean"]["last"]["rouge1"] == 90
    assert unseen["clients"]["cyd"]["best"]["round"] == 3


def test_a_missing_metric_is_passed_over():
    bare = {"event": "evaluate", "round": 3, "client": "ann", "loss": 0.5}
    results = summarise([*EVENTS, bare, {"event": "fail", "round": 1, "client": "zoe"}])
    assert results["clients"]["ann"]["last"] == {"round": 3, "loss": 0.5}
    assert results["clients"]["ann"]["best"]["rouge1"] == 60
    assert results["mean"]["last"] == {"rouge1": 80, "exact_match": 40, "loss": 0.375}
    assert results["worst"] == {"client": "bob", "value": 80}
    rows = [cells(line) for line in client_table(results).splitlines()]
    assert rows[2] == ["ann", "10.0", "-", "60.0", "1", "-", "0.500"]
    assert rows[4] == ["zoe", "-", "-", "-", "-", "-", "-"]
    assert len(list(csv.DictReader(io.StringIO(client_csv(results))))) == 3


def test_a_loss_that_is_not_a_number_is_shown_and_spoils_nothing_else():
    results = summarise([*EVENTS, scored(3, "ann", 70.0, loss=float("nan"))])
    rows = [cells(line) for line in client_table(results).splitlines()]
    assert rows[2] == ["ann", "10.0", "70.0", "70.0", "3", "35.0", "nan"]
    assert rows[4][2] == "75.0"


def test_images_are_ranked_by_accuracy():
    events = [
        {"event": "evaluate", "round": r, "client": "ann", "accuracy": a, "loss": 1.0}
        for r, a in enumerate((10.0, 90.0, 40.0))
    ]
    results = summarise(events)
    assert results["metric"] == "accuracy"
    assert results["clients"]["ann"]["best"]["round"] == 1
    assert client_table(results).startswith("| client | accuracy base | last |")


def test_the_table_has_every_client_and_sums_them_up():
    lines = client_table(summarise(EVENTS)).splitlines()
    header = ["client", "ROUGE-1 base", "last", "best", "round", "exact match", "loss"]
    assert cells(lines[0]) == header
    assert [cells(line) for line in lines[2:]] == [
        ["ann", "10.0", "50.0", "60.0", "1", "25.0", "1.000"],
        ["bob", "20.0", "80.0", "80.0", "2", "40.0", "0.250"],
        ["mean", "15.0", "65.0", "70.0", "", "32.5", "0.625"],
        ["worst", "10.0", "50.0", "60.0", "", "25.0", "1.000"],
        ["spread", "5.0", "15.0", "10.0", "", "7.5", "0.375"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_the_table_of_two_adapters_has_each_alone_and_the_gate():
    lines = client_table(summarise([*EVENTS, *PARTS, *GATES])).splitlines()
    assert cells(lines[0])[1:5] == ["ROUGE-1 base", "individual", "RoW", "mixed"]
    assert cells(lines[2])[1:5] == ["10.0", "45.0", "30.0", "50.0"]
    assert [cells(line)[-1] for line in lines[2:]] == ["0.50", "0.60", "0.55", "", "0.05"]


def test_unseen_clients_have_a_table_of_their_own():
    known, title, unseen = client_table(summarise([*EVENTS, *UNSEEN])).split("\n\n")
    assert "cyd" not in known
    assert title == "unseen clients (rounds are epochs of their fit)"
    assert cells(unseen.splitlines()[2])[:5] == ["cyd", "30.0", "90.0", "90.0", "3"]


def test_csv_has_unrounded_numbers_of_all_clients():
    events = [*EVENTS, scored(3, "bob", 100 / 3), *PARTS, *GATES, *UNSEEN]
    rows = list(csv.DictReader(io.StringIO(client_csv(summarise(events)))))
    ann, bob, cyd = rows
    assert (ann["client"], ann["unseen"], ann["individual"]) == ("ann", "0", "45.0")
    assert (float(bob["last"]), float(bob["best"]), bob["best_round"]) == (100 / 3, 80, "2")
    assert (ann["gate"], ann["refused"], ann["sent"]) == ("0.5", "1", str(2**20))
    assert (cyd["unseen"], cyd["last"], cyd["individual"]) == ("1", "90.0", "")


def test_numbers_as_people_read_them():
    assert [duration(s) for s in (34.21, 723, 7500)] == ["34.2 s", "12 min 3 s", "2 h 5 min"]
    assert [mib(n) for n in (0, 2**18, 2**20 * 1234.56)] == ["0", "0.25", "1234.6"]
    assert spread_of([65.0, 69.0], sample=True) == pytest.approx(8**0.5)


def write_run(folder, events, times=()):
    folder.mkdir(exist_ok=True)
    for name, rows in (("metrics.jsonl", events), ("times.jsonl", times)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_round_done_twice_counts_once(tmp_path):
    def took(number, seconds):
        return {"round": number, "phase": "train", "client": "ann", "seconds": seconds}

    write_run(tmp_path, [], [took(1, 5.0), took(2, 7.0), took(2, 1.5)])
    assert sum(row["seconds"] for row in read_times(tmp_path / "times.jsonl")) == 6.5


def test_a_running_run_can_be_reported(tmp_path):
    write_run(tmp_path, EVENTS[:6])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"event": "eval')
    assert len(read_events(tmp_path / "metrics.jsonl")) == 6
    text, page = write_report(tmp_path, "a run")
    assert "ann" in text
    assert page == tmp_path / "report" / "report.html"
    assert "1 so far" in page.read_text()
    table, verdict = text.split("\n\n")
    assert (tmp_path / "report" / "clients.md").read_text() == table + "\n"
    assert verdict.startswith("By ROUGE-1, so far, in round 1, ")
    assert (tmp_path / "report" / "clients.csv").read_text().count("\n") == 3


def test_clients_that_joined_have_files_of_their_own(tmp_path):
    write_run(tmp_path, EVENTS)
    (tmp_path / "joined").mkdir()
    lines = "".join(json.dumps(event) + "\n" for event in UNSEEN)
    (tmp_path / "joined" / "cyd.jsonl").write_text(lines)
    assert read_results(tmp_path) == summarise([*EVENTS, *UNSEEN])
    text, page = write_report(tmp_path, "a run")
    assert unseen_table(read_results(tmp_path)) in text
    assert "Of unseen clients, the fit beats where it\nbegan in 1 of 1 client" in text
    assert "<h2>Unseen clients" in page.read_text()


def test_a_run_that_scored_nothing_yet_is_refused(tmp_path):
    write_run(tmp_path, [{"event": "train", "round": 1, "client": "ann", "loss": 1.0}])
    with pytest.raises(InputError, match="nothing is scored yet"):
        write_report(tmp_path, "a run")


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"event": "late"}\n{"event":\n{}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: broken JSON"):
        write_report(tmp_path, "a run")


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from fedalt.report.tensorboard import write_tensorboard

    odd = '../a/b "é'
    write_run(tmp_path, [*EVENTS, *PARTS, *GATES, *UNSEEN, scored(1, odd, 5.0)])
    for _ in range(2):  # the second one takes the place of the first
        root = write_tensorboard(tmp_path)
    assert root == tmp_path / "report" / "tensorboard"
    assert {path.parent for path in root.rglob("*tfevents*")} == set(root.iterdir())
    names = {path.name for path in root.iterdir()}
    assert names >= {"client-ann", "client-bob", "unseen-cyd", "mean"}
    assert len(names) == 5

    def read(name, tag):
        events = EventAccumulator(str(root / name))
        events.Reload()
        return [(scalar.step, scalar.value) for scalar in events.Scalars(tag)]

    assert read("client-ann", "test/rouge1") == [(0, 10), (1, 60), (2, 50)]
    assert read("client-ann", "train/loss") == [(1, 0.5)]
    assert read("client-ann", "gates/0.q") == [(2, 0.25)]
    assert read("client-bob", "individual/rouge1") == [(2, 70)]
    assert read("client-bob", "traffic/sent") == [(1, 2**20), (2, 100)]
    assert read("unseen-cyd", "test/rouge1") == [(0, 30), (3, 90)]
    assert read("mean", "test/rouge1")[0] == (0, 15)


def test_tensorboard_that_is_not_installed_is_named(tmp_path, monkeypatch):
    from fedalt.report.tensorboard import write_tensorboard

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"pip install 'fedalt\[tensorboard\]'"):
        write_tensorboard(tmp_path)
