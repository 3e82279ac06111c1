"""Runs of several methods in, tables and a page out; every number here is worked out by hand."""

import csv
import io
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fedalt.errors import InputError
from fedalt.report import compare_csv, compare_page, compare_table
from fedalt.report.method_sheets import seed_sheet
from fedalt.report.summary import summarise
from fedalt.report.tables import console_text, sheet_text
from fedalt.report.words import method_verdict
from fedalt.run.comparison import compare


def run_of(ann, bob, seconds=None, sent=0, unseen=None):
    """Two clients that start at 10 and end, in round 1, at ``ann`` and ``bob``."""
    events = []
    for number, scores in enumerate(((10.0, 10.0), (ann, bob))):
        for client, rouge1 in zip(("ann", "bob"), scores, strict=True):
            values = {"rouge1": rouge1, "exact_match": rouge1 / 2, "loss": 1.0 - number / 2}
            events.append({"event": "evaluate", "round": number, "client": client, **values})
            traffic = {"round": number, "client": client, "sent": sent, "received": 0}
            events.append({"event": "traffic", **traffic})
    if unseen is not None:
        values = {"round": 0, "client": "new", "unseen": True, "rouge1": unseen}
        events.append({"event": "evaluate", **values})
    return {**summarise(events), "seconds": seconds}


def test_settings_are_refused_before_any_run(tiny_config):
    """Ranks that one of the methods cannot mix."""
    config = replace(tiny_config, lora=replace(tiny_config.lora, client_ranks={"ann": 1}))
    with pytest.raises(InputError, match=r"client_ranks.ann: fedalt wants one rank for all"):
        compare(config, ["local", "fedalt"], [0], 1, False)
    assert not Path(config.out).exists()


RUNS = {
    "fedalt": [run_of(60.0, 70.0, 10.0, 2**20, 40.0), run_of(58.0, 80.0, 12.0, 2**20, 44.0)],
    "fedit": [run_of(50.0, 60.0, 8.0, 2**20), run_of(50.0, 62.0, 8.0, 2**20)],
    "local": [run_of(50.0, 65.0, 5.0), run_of(59.0, 60.0, 5.0)],
}
SEEDS = [3, 7]


def cells(text):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [rows[0], *rows[2:]]


def test_methods_are_compared_by_mean_and_spread():
    methods, _ = compare_table(RUNS, SEEDS).split("\n\n")
    header, fedalt, fedit, local = cells(methods)
    assert header == [
        *("method", "ROUGE-1 last", "best", "exact", "loss", "worst", "spread"),
        *("unseen", "seconds", "MiB", "wins"),
    ]
    # means 65 and 69 deviate by 2√2, worst 60 and 58 by √2, spreads are 5 and 11
    assert fedalt == [
        *("fedalt", "67.0 ± 2.8", "67.0", "33.5", "0.500 ± 0.000", "59.0 ± 1.4", "8.0"),
        *("42.0 ± 2.8", "11.0", "4.00", "3/4"),
    ]
    # 50 is not above 50
    assert fedit[-1] == "1/4"
    assert local[-2:] == ["0.00", "-"]
    assert fedit[7] == local[7] == "-"
    assert max(map(len, methods.splitlines())) <= 120


def test_the_differences_from_local_are_paired_by_seed():
    sheet = seed_sheet(RUNS, SEEDS)
    assert cells(sheet_text(sheet)) == [
        ["ROUGE-1 by seed", "3", "7", "mean"],
        ["local", "57.5", "59.5", "58.5 ± 1.4"],
        ["fedalt - local", "+7.5", "+9.5", "+8.5 ± 1.4"],
        ["fedit - local", "-2.5", "-3.5", "-3.0 ± 0.7"],
    ]


def test_without_local_nothing_is_paired():
    runs = {name: results for name, results in RUNS.items() if name != "local"}
    assert seed_sheet(runs, SEEDS) is None
    rows = cells(compare_table(runs, SEEDS))[1:]
    assert [row[0] for row in rows] == ["fedalt", "fedit"]
    assert [row[-1] for row in rows] == ["-", "-"]
    assert seed_sheet({"local": RUNS["local"]}, SEEDS) is None


def test_one_seed_has_no_deviation_and_empty_columns_are_left_out():
    runs = {"fedalt": [run_of(60.0, 70.0)]}
    header, row = cells(compare_table(runs, [0]))
    assert header[-2:] == ["MiB", "wins"]
    assert "seconds" not in header
    assert "unseen" not in header
    assert row[1] == "65.0"


def test_images_are_compared_by_accuracy():
    events = [
        {"event": "evaluate", "round": 0, "client": "ann", "accuracy": 50.0, "loss": 1.0},
        {"event": "evaluate", "round": 0, "client": "bob", "accuracy": 70.0, "loss": 2.0},
    ]
    header, row = cells(compare_table({"fedalt": [summarise(events)]}, [0]))
    assert header[:5] == ["method", "accuracy last", "best", "loss", "worst"]
    assert row[:5] == ["fedalt", "60.0", "60.0", "1.500", "50.0"]


def test_csv_has_a_line_a_run():
    rows = list(csv.DictReader(io.StringIO(compare_csv(RUNS, SEEDS))))
    assert [(row["method"], row["seed"]) for row in rows[:3]] == [
        ("fedalt", "3"),
        ("fedalt", "7"),
        ("fedit", "3"),
    ]
    assert (rows[1]["last"], rows[1]["worst"], rows[1]["spread"]) == ("69.0", "58.0", "11.0")
    assert (rows[1]["wins"], rows[1]["pairs"]) == ("1", "2")
    assert (rows[4]["method"], rows[4]["wins"], rows[4]["mib"]) == ("local", "", "0.0")


def test_the_page_has_a_line_a_method():
    html = compare_page("three methods", RUNS, SEEDS, "rounds: 1\nseed: <0>\n")
    found = re.findall(r"<svg class=\"chart\".*?</svg>", html, re.DOTALL)
    curves, losses, price = (ElementTree.fromstring(svg) for svg in found)
    assert [len(chart.findall("polyline")) for chart in (curves, losses, price)] == [3, 3, 3]
    titles = [line.find("title").text for line in curves.findall("polyline")]
    assert titles == ["fedalt: 10 to 67", "fedit: 10 to 55.5", "local: 10 to 58.5"]
    assert not re.search(r"https?:|src=|href=", html)
    assert "seed: &lt;0&gt;" in html
    # by client: ann's and bob's means over the seeds
    row = r'<th scope="row">ann</th><td>59.0</td><td>50.0</td><td>54.5</td>'
    assert row in html
    assert html.count("<table") == 3


def test_the_page_without_traffic_has_no_price():
    html = compare_page("alone", {"local": RUNS["local"]}, SEEDS, "")
    assert html.count('<svg class="chart"') == 2
    assert "By seed" not in html


@pytest.mark.parametrize("count", [8, 9])
def test_methods_beyond_the_colours_are_dashed(count):
    runs = {f"method-{i}": RUNS["fedit"] for i in range(count)}
    assert ("c0 dashed" in compare_page("many", runs, SEEDS, "")) == (count > 8)


def test_the_verdict_names_the_first_and_what_training_alone_reaches():
    # fedalt: 65 and 69; local: 57.5 and 59.5; three of four clients above theirs in local
    assert method_verdict(RUNS, SEEDS) == (
        "By ROUGE-1, fedalt comes first: 67.0 over 2 seeds, 8.5 above local and ahead of it with 2 "
        "of 2. It beats local, each client alone, in 3 of 4 pairs of client and seed, by 8.5 on "
        "average."
    )
    one = {name: results[:1] for name, results in RUNS.items() if name != "local"}
    assert method_verdict(one, [3]) == (
        "By ROUGE-1, fedalt comes first: 65.0 over 1 seed, 10.0 above fedit. One seed does not "
        "tell how far that varies. Without local nothing tells what each client reaches alone."
    )
    even = {"fedit": RUNS["fedit"], "fedalt": RUNS["fedit"]}
    assert (
        "fedit comes first: 55.5 over 2 seeds, level with fedalt and ahead of it with 0 of 2."
        in (method_verdict(even, SEEDS))
    )
    behind = {"fedit": RUNS["fedit"], "local": RUNS["local"]}
    assert method_verdict(behind, SEEDS) == (
        "By ROUGE-1, local comes first: 58.5 over 2 seeds, 3.0 above fedit and ahead of it with 2 "
        "of 2."
    )


def test_the_tables_fit_a_terminal_and_keep_what_matters():
    runs = {f"fedalt-with-a-very-long-name-{i}": results for i, results in enumerate(RUNS.values())}
    runs["local"] = RUNS["local"]
    many = list(range(30))
    wide = {name: results * 15 for name, results in runs.items()}
    text = compare_table(wide, many, console_text)
    assert max(map(len, text.splitlines())) <= 80
    methods, by_seed = text.split("\n\n")
    assert {"method", "ROUGE-1 last", "worst", "wins"} <= set(cells(methods)[0])
    assert cells(by_seed)[0][-1] == "mean"
    assert len(cells(compare_table(wide, many).split("\n\n")[1])[0]) == 32  # the file has all


def test_the_page_says_what_was_run():
    times = [
        {
            **{"round": 0, "phase": "start", "client": "", "seconds": 2.0, "device": "cpu"},
            **{"date": "2026-01-02T03:04:05+00:00", "python": "3.12.1", "fedalt": "0.1"},
            **{"torch": "2.11", "transformers": "5.17"},
        },
        {"round": 1, "phase": "train", "client": "ann", "seconds": 60.0},
    ]
    html = compare_page("t", RUNS, SEEDS, "model: {path: m}\nmethod: fedalt\n", times)
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert facts["model"] == "m"
    assert "method" not in facts
    assert (facts["seeds"], facts["clients"], facts["device"]) == ("3, 7", "2", "cpu")
    assert facts["time of all runs"] == "1 min 2 s"
    assert facts["versions"] == "fedalt 0.1, torch 2.11, transformers 5.17, Python 3.12.1"
    assert '<p class="verdict">By ROUGE-1, fedalt comes first' in html
    names = re.findall(r'class="name"[^>]*>(.*?)</text>', html)
    assert sorted(names) == sorted(["fedalt", "fedit", "local"] * 3)
