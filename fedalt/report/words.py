"""What was found, in words: the verdict on a run or a comparison, and what the terms mean."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from fedalt.report.client_sheets import has_parts
from fedalt.report.method_sheets import LOCAL, Runs, pairs
from fedalt.report.tables import CONSOLE, Results, count, digits_of, label, mean_of

TERMS = {
    "base": "a client's score before the first round.",
    "alone": "the score with one adapter at work, its weight 1 in every layer, the other's 0.",
    "RoW": "Rest-of-World, the frozen adapter that a client receives, made of the others'.",
    "mixed": "both adapters at work, as the client's mixer weighs them; what the client uses.",
    "95 % interval": "where a client's last score would mostly lie with other test records of its "
    "kind: {how}. Other seeds may move it further.",
    "best": "the best of the evaluated rounds by test score, so a little flattered; the last round "
    "is what counts.",
    "gate": "the individual adapter's share of the mix, from 0 to 1, averaged over tokens and "
    "layers; the rest is RoW's.",
    "mean, worst, spread": "over the clients, column by column; the spread is their (population) "
    "standard deviation, 0 where all fare alike.",
    "ROUGE-1, -2, -L": "what generated and right answers share of words, of pairs of words, and in "
    "order (longest common subsequence): F-measures in percent, words stemmed.",
    "exact match": "percent of answers that equal the right one but for outer white space.",
    "accuracy": "percent of questions for which the right {what} was named.",
    "choice": "percent of questions whose right option is the likeliest; norm: a byte.",
    "loss": "nats {unit} of the right answers; less is better.",
}
METHOD_TERMS = {
    "±": "the standard deviation over the seeds.",
    "worst, spread": "of a run's clients: the last score of the worst, and the (population) "
    "standard deviation; means over the seeds.",
    "wins": f"clients above what they reach in {LOCAL}, each alone, of all, over the seeds.",
    "unseen": "the last score of clients that joined after the training.",
    "MiB": "all that the clients sent and received.",
}


def verdict(results: Results, method: str = "", finished: bool = True) -> str:
    """One to three sentences: against the individual adapter alone, against the base.

    Args:
        results: of the run.
        method: its name.
        finished: whether its last round is over.
    """
    metric, clients = results["metric"], results["clients"]
    two = any("gates" in client for client in clients.values())
    subject = "mixed" if two else method or "the last round"
    sentences = []
    if has_parts(results):
        scores = _scores(clients, metric, "individual")
        sentences.append(beats(subject, "the individual adapter alone", scores, metric))
    against_base = _scores(clients, metric, "base")
    if results["round"] and against_base:
        name = "it" if sentences else subject
        sentences.append(beats(name, "the base before training", against_base, metric))
    if not results["round"]:
        sentences.append("nothing was trained yet")
    elif not against_base:
        sentences.append("the base before training was not scored")
    if two and not has_parts(results):
        when = "" if finished else " yet"
        sentences.append(f"the adapters were not scored alone{when}")
    if missing := sum(metric not in client.get("last", {}) for client in clients.values()):
        sentences.append(f"{missing} of {count(len(clients), 'client')} without a score")
    if "unseen" in results:
        fitted = _scores(results["unseen"]["clients"], metric, "base")
        if fitted:
            rival = "where it began"
            sentences.append(f"of unseen clients, {beats('the fit', rival, fitted, metric)}")
    start = "" if finished else f"so far, in round {results['round']}, "
    first = f"by {label(metric)}, {start}{sentences[0]}"
    return " ".join(f"{s[0].upper()}{s[1:]}." for s in (first, *sentences[1:]))


def _scores(
    clients: Mapping[str, Mapping[str, Any]], metric: str, rival: str
) -> list[tuple[float, float]]:
    """Last score and the rival's, of every client that has both; the base is no rival of itself."""
    return [
        (client["last"][metric], client[rival][metric])
        for client in clients.values()
        if metric in client.get("last", {}) and metric in client.get(rival, {})
        if client["last"]["round"] != client[rival].get("round")
    ]


def beats(
    subject: str,
    rival: str,
    scores: Sequence[tuple[float, float]],
    metric: str,
    what: str = "client",
) -> str:
    """``SUBJECT beats RIVAL in 7 of 8 clients, by 17.5 on average``, or what else is true.

    Args:
        subject, rival: their names.
        scores: pairs of them, subject's first; one or more.
        metric: their metric, of which more is better.
        what: a pair is one of.
    """
    won, even = sum(a > b for a, b in scores), sum(a == b for a, b in scores)
    digits = digits_of(metric)
    mean = round(statistics.fmean(a - b for a, b in scores), digits)
    text = f"{subject} beats {rival} in {won or 'none'} of {count(len(scores), what)}"
    text += f" and equals it in {even}" if even else ""
    if mean > 0:
        return f"{text}, by {mean:.{digits}f} on average"
    if mean < 0:
        return f"{text}{', but' if won else ' and'} is {-mean:.{digits}f} below on average"
    return f"{text}; on average they are level"  # to the digits that are shown


def method_verdict(runs: Runs, seeds: Sequence[int]) -> str:
    """Which method comes first, how far ahead and how surely, and what training alone reaches."""
    metric = next(iter(runs.values()))[0]["metric"]
    digits, last = digits_of(metric), {name: _lasts(runs[name], metric) for name in runs}
    means = {name: mean_of(values) for name, values in last.items()}
    ranked = sorted((n for n in runs if means[n] is not None), key=lambda n: -(means[n] or 0))
    if not ranked:
        return "No method was scored."
    first, over = ranked[0], f"over {count(len(seeds), 'seed')}"
    sentences = [f"By {label(metric)}, {first} comes first: {means[first]:.{digits}f} {over}"]
    if ranked[1:]:
        both = zip(last[first], last[ranked[1]], strict=True)
        won = sum(a is not None and b is not None and a > b for a, b in both)
        lead = round((means[first] or 0) - (means[ranked[1]] or 0), digits)
        ahead = f"{lead:.{digits}f} above" if lead else "level with"
        sentences[0] += f", {ahead} {ranked[1]}"
        if len(seeds) > 1:
            sentences[0] += f" and ahead of it with {won} of {len(seeds)}"
        else:
            sentences.append("One seed does not tell how far that varies")
    if LOCAL not in runs:
        sentences.append(f"Without {LOCAL} nothing tells what each client reaches alone")
    elif first != LOCAL and (scores := pairs(runs[first], runs[LOCAL])):
        name = f"{LOCAL}, each client alone,"
        sentences.append(beats("It", name, scores, metric, "pair of client and seed"))
    return " ".join(f"{sentence}." for sentence in sentences)


def _lasts(results: Sequence[Results], metric: str) -> list[float | None]:
    return [run["mean"].get("last", {}).get(metric) for run in results]


def terms(results: Results, kind: str) -> dict[str, str]:
    """What the words of a run's tables mean, of those that are in them."""
    metric, clients = results["metric"], results["clients"].values()
    metrics = set(results["mean"].get("last", {}))
    there = {
        "base": any("base" in client for client in clients),
        **dict.fromkeys(("alone", "RoW", "mixed"), has_parts(results)),
        "95 % interval": any("interval" in client for client in clients),
        "gate": any(client.get("gates") for client in clients),
        "ROUGE-1, -2, -L": "rouge1" in metrics,
        "exact match": "exact_match" in metrics,
        **{name: name in metrics for name in ("accuracy", "choice", "loss")},
    }
    fill = {
        "how": "the percentile bootstrap over them, 2000 resamples"
        if metric.startswith("rouge")
        else "Wilson's, from the number of right answers",
        "what": "class" if kind == "image" else "option",
        "unit": "an image" if kind == "image" else "a token",
    }
    return {name: told.format(**fill) for name, told in TERMS.items() if there.get(name, True)}


def method_terms(runs: Runs) -> dict[str, str]:
    """What the words of a comparison's tables mean, of those that are in them."""
    first = [results[0] for results in runs.values()]
    there = {
        "±": len(next(iter(runs.values()))) > 1,
        "wins": LOCAL in runs,
        "unseen": any("unseen" in run for run in first),
    }
    return {name: told for name, told in METHOD_TERMS.items() if there.get(name, True)}


def wrapped(sentence: str) -> str:
    """A text in lines that fit a terminal."""
    return textwrap.fill(sentence, CONSOLE)
