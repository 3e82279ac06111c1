"""The verdict in words, good, bad or unknown; every number is worked out by hand."""

import pytest

from fedalt.report.summary import summarise
from fedalt.report.tables import count
from fedalt.report.words import beats, terms, verdict, wrapped


def events_of(scores, metric="rouge1", last=2, gates=True):
    """By client: base, individual alone and last score; None is not scored."""
    for client, (base, alone, mixed) in scores.items():
        for number, value in ((0, base), (last, mixed)):
            if value is not None:
                yield {"event": "evaluate", "round": number, "client": client, metric: value}
        if gates:
            yield {"event": "gates", "round": last, "client": client, "layers": {"0.q": 0.5}}
        if alone is not None:
            part = {"part": "individual", metric: alone}
            yield {"event": "part", "round": last, "client": client, **part}


def told(scores, finished=True, method="fedalt", **more):
    return verdict(summarise(events_of(scores, **more)), method, finished)


def test_a_run_that_went_well():
    scores = {"ann": (10.0, 40.0, 60.0), "bob": (20.0, 50.0, 45.0), "cyd": (0.0, 30.0, 60.0)}
    # 20, -5 and 30 above alone; 50, 25 and 60 above the base
    assert told(scores) == (
        "By ROUGE-1, mixed beats the individual adapter alone in 2 of 3 clients, by 15.0 on "
        "average. It beats the base before training in 3 of 3 clients, by 45.0 on average."
    )


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ([(1.0, 3.0), (2.0, 4.0)], "a beats b in none of 2 clients and is 2.0 below on average"),
        ([(5.0, 3.0), (2.0, 9.0)], "a beats b in 1 of 2 clients, but is 2.5 below on average"),
        (
            [(3.0, 3.0), (9.0, 3.0)],
            "a beats b in 1 of 2 clients and equals it in 1, by 3.0 on average",
        ),
        (
            [(3.0, 3.0)],
            "a beats b in none of 1 client and equals it in 1; on average they are level",
        ),
        ([(3.04, 3.0)], "a beats b in 1 of 1 client; on average they are level"),
    ],
)
def test_a_verdict_is_as_honest_when_it_is_bad(scores, wanted):
    assert beats("a", "b", scores, "rouge1") == wanted


def test_what_was_not_measured_is_said():
    scores = {"ann": (10.0, None, 60.0), "bob": (20.0, None, None)}
    assert told(scores) == (
        "By ROUGE-1, mixed beats the base before training in 1 of 1 client, by 50.0 on average. "
        "The adapters were not scored alone."
    )
    assert told(scores, finished=False).endswith("The adapters were not scored alone yet.")
    assert told({"ann": (None, None, 5.0)}, gates=False) == (
        "By ROUGE-1, the base before training was not scored."
    )
    assert told({"ann": (5.0, None, None)}, gates=False) == ("By ROUGE-1, nothing was trained yet.")


def test_a_client_without_a_score_is_counted():
    events = [
        *events_of({"ann": (10.0, None, 60.0)}, gates=False),
        {"event": "fail", "round": 1, "client": "zoe", "reason": "x"},
    ]
    assert verdict(summarise(events), "fedit").endswith(
        "fedit beats the base before training in 1 of 1 client, by 50.0 on average. "
        "1 of 2 clients without a score."
    )


def test_what_terms_mean_goes_by_the_kind_of_data():
    events = list(events_of({"ann": (10.0, None, 50.0)}, metric="accuracy"))
    events.append(
        {"event": "answers", "round": 2, "client": "ann", "train": 1, "test": 4, "shown": []}
    )
    found = terms(summarise(events), "image")
    assert "right class" in found["accuracy"]
    assert "Wilson" in found["95 % interval"]
    assert "ROUGE-1, -2, -L" not in found
    assert "right option" in terms(summarise(events), "text")["accuracy"]


def test_lines_fit_a_terminal():
    assert max(map(len, wrapped("word " * 60).splitlines())) <= 80
    assert [count(n, "pair of shoes") for n in (1, 2)] == ["1 pair of shoes", "2 pairs of shoes"]
