"""Events in, results and tables out."""

import pytest

from fedalt.compare import compare_table
from fedalt.report import client_table, read_events, summarise, table, write_report


def scored(number, client, rouge1, loss=1.0):
    return {
        "event": "evaluate",
        "round": number,
        "client": client,
        "rouge1": rouge1,
        "exact_match": rouge1 / 2,
        "loss": loss,
    }


EVENTS = [
    scored(0, "ann", 10.0),
    scored(0, "bob", 20.0),
    {"event": "train", "round": 1, "client": "ann", "loss": 0.5},
    scored(1, "ann", 60.0),
    scored(1, "bob", 40.0),
    scored(2, "ann", 50.0),
    scored(2, "bob", 80.0, loss=0.25),
]


def test_last_and_best_are_kept_apart():
    results = summarise(EVENTS)
    assert results["round"] == 2
    ann, bob = results["clients"]["ann"], results["clients"]["bob"]
    assert (ann["last"]["rouge1"], ann["best"]["rouge1"], ann["best"]["round"]) == (50, 60, 1)
    assert bob["last"] == bob["best"] == bob["curve"][2]
    assert results["mean"]["last"] == {"rouge1": 65, "exact_match": 32.5, "loss": 0.625}
    assert results["mean"]["best"]["rouge1"] == 70


def test_the_table_has_every_client_and_the_mean():
    lines = client_table(summarise(EVENTS)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2] == ["ann", "10.0", "50.0", "60.0", "1", "25.0", "1.000"]
    assert cells[4] == ["mean", "15.0", "65.0", "70.0", "", "32.5", "0.625"]
    assert len({len(line) for line in lines}) == 1


def test_methods_are_compared_by_mean_and_spread():
    other = [{**event, "rouge1": event["rouge1"] + 4} for event in EVENTS if "rouge1" in event]
    text = compare_table(
        {"fedalt": [summarise(EVENTS), summarise(other)], "local": [summarise(EVENTS)]}
    )
    (pair, alone) = [
        [cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines()[2:]
    ]
    # last 65 and 69, best 70 and 74, worst client 50 and 54: each deviates by 2√2
    assert pair == ["67.0 ± 2.8", "72.0 ± 2.8", "32.5 ± 0.0", "52.0 ± 2.8", "0.625 ± 0.000"]
    assert alone == ["65.0", "70.0", "32.5", "50.0", "0.625"]


def test_columns_line_up():
    assert table(("a", "number"), [["long name", "1"]]) == (
        "| a         | number |\n|-----------|-------:|\n| long name |      1 |"
    )


def test_a_running_run_can_be_reported(tmp_path):
    import json

    lines = "".join(json.dumps(event) + "\n" for event in EVENTS[:5])
    (tmp_path / "metrics.jsonl").write_text(lines + '{"event": "eval')
    assert len(read_events(tmp_path / "metrics.jsonl")) == 5
    text, plot = write_report(tmp_path, "a run")
    assert "ann" in text
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report" / "clients.md").read_text() == text + "\n"


def test_a_run_that_scored_nothing_yet_is_refused(tmp_path):
    from fedalt import InputError

    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="nothing is scored yet"):
        write_report(tmp_path, "a run")
