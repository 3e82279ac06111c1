"""Page and text tables: well formed, escaped, complete for one client or a hundred."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from fedalt.report.page import Line, _ticks, heat_map, line_chart, sheet_html, stacked_bars, text
from fedalt.report.report import run_page, summarise
from fedalt.report.tables import Sheet, sheet_text, table

VOID = {"meta"}
ODD = '<b>"Zoë" & \x1b\u682a</b>'


class Reader(HTMLParser):
    """Fails on a tag that is not closed; keeps the tags, their attributes and the text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def drawings(html):
    """Every drawing of a page, as XML."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def charts(html):
    return [svg for svg in drawings(html) if svg.get("role") == "img"]


def lines_of(chart):
    return chart.findall("polyline")


def events_of(clients, rounds, first_round=0):
    for number in range(first_round, rounds + 1):
        for i, client in enumerate(clients):
            scores = {"rouge1": 10.0 * number + i, "loss": 2.0 / (number + 1)}
            yield {"event": "evaluate", "round": number, "client": client, **scores}
            if number:
                traffic = {"round": number, "client": client, "sent": 2**20, "received": 2**20}
                yield {"event": "traffic", **traffic}
                gates = {"model.0.q": 0.4, "model.1.q": 0.7}
                yield {"event": "gates", "round": number, "client": client, "layers": gates}


def times_of(rounds):
    for number in range(rounds + 1):
        for phase, seconds in (("train", 2.0), ("evaluate", 1.0)):
            yield {"round": number, "phase": phase, "client": "", "seconds": seconds}


def page_of(events, times=(), config="", finished=True, title="a run"):
    html = run_page(title, summarise(events), list(times), config, finished)
    return html, Reader(html)


def test_a_run_has_all_its_sections():
    html, reader = page_of(
        events_of(["ann", "bob"], 3), times_of(3), config="method: fedalt\nrounds: 3\n"
    )
    headings = [reader.texts[i] for i, t in enumerate(reader.texts) if t in html]
    for heading in ("Clients", "Curves", "Gates", "Time", "Refused, failed and late updates"):
        assert heading in headings
    assert reader.count("title") > 1  # the page's own, and those of what is drawn
    facts = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html)
    assert facts == [
        ("clients", "2"),
        ("rounds", "3"),
        ("mean ROUGE-1", "0.5 → 30.5"),
        ("time", "12.0 s"),
        ("sent by clients", "6 MiB"),
        ("received by clients", "6 MiB"),
    ]
    assert "<pre>method: fedalt\nrounds: 3</pre>" in html
    # curves of two metrics with a line a client and the mean, the price, the gates, the time
    curves, losses, price, gates, time = charts(html)
    assert [len(lines_of(chart)) for chart in (curves, losses, price)] == [3, 3, 1]
    assert len(gates.findall("rect")) == 2 * 4
    assert len(time.findall("rect")) == 2 * 4
    assert "none" in reader.texts


def test_a_page_fetches_nothing():
    html, reader = page_of(events_of(["ann", "bob"], 3), times_of(3))
    assert not re.search(r"https?:|//\w|@import|url\(", html)
    assert not {"src", "href", "srcset"} & {name for _, given in reader.tags for name in given}
    assert not {"link", "img", "iframe"} & {tag for tag, _ in reader.tags}


def test_a_page_can_be_read_without_seeing_it():
    _, reader = page_of(events_of(["ann", "bob"], 3), times_of(3))
    assert reader.tags[0][1] == {"lang": "en"}
    for tag, given in reader.tags:
        if tag == "svg":
            assert given.get("aria-label") or given.get("aria-hidden") == "true"
        if tag == "th":
            assert given["scope"] in ("col", "row")
    assert reader.count("thead") == reader.count("table") == 2


def test_what_comes_from_outside_is_only_shown():
    events = [
        *events_of([ODD, "bob"], 2),
        {"event": "refuse", "round": 1, "client": ODD, "reason": "<script>alert(1)</script>"},
        {"event": "thin", "round": 2, "client": "", "reason": ""},
    ]
    html, reader = page_of(events, times_of(2), config="path: '</pre><img>'", title=ODD)
    assert "<b>" not in html
    assert reader.count("script") == 1
    assert reader.count("img") == 0
    assert "<script>alert(1)</script>" in reader.texts
    assert "path: '</pre><img>'" in reader.texts
    assert '<b>"Zoë" & \N{REPLACEMENT CHARACTER}株</b>' in reader.texts
    assert "too few clients" in reader.texts
    assert len(charts(html)) == 5
    assert text('"<&') == "&quot;&lt;&amp;"


@pytest.mark.parametrize(("clients", "rounds"), [(1, 0), (1, 3), (100, 0), (100, 200)])
def test_one_client_or_a_hundred(clients, rounds):
    names = [f"client-{i}" for i in range(clients)]
    html, _ = page_of(events_of(names, rounds), times_of(rounds))
    rows = re.findall(r"<tbody>(.*?)</tbody>", html)[0].count("<tr>")
    assert rows == clients
    curves = charts(html)[0]
    styles = [line.get("class") for line in lines_of(curves)]
    if clients == 1:
        assert styles == ["c0"]
    else:
        assert styles == ["thin"] * 100 + ["worst", "mean"]
        assert "worst: client-0</span>" in html
    assert len(lines_of(curves)[0].get("points").split()) == max(rounds + 1, 2)


def test_a_running_run_without_times_or_a_base():
    html, _ = page_of(events_of(["ann", "bob"], 2, first_round=2), finished=False)
    assert "<dd>2 so far</dd>" in html
    assert "<dd>- → 20.5</dd>" in html
    assert "<dt>time</dt><dd>-</dd>" in html


def test_a_client_without_scores_has_its_row():
    events = [*events_of(["ann"], 2), {"event": "fail", "round": 1, "client": "zoe", "reason": "x"}]
    html, _ = page_of(events)
    assert '<th scope="row">zoe</th><td>-</td>' in html


def test_points_lie_where_they_should():
    lines = [Line("a", [(0, 0.0), (1, 50.0), (2, 100.0), (3, float("nan"))], "c0")]
    (chart,) = charts(line_chart("score", "round", lines))
    (line,) = lines_of(chart)
    # the plot is 52 to 466 across and, upside down, 12 to 254 high
    assert line.get("points") == "52.0,254.0 259.0,133.0 466.0,12.0"
    assert line.find("title").text == "a: 0 to 100"
    assert line_chart("score", "round", [Line("a", [(0, float("nan"))], "c0")]) == ""


def test_a_line_of_one_point_is_a_dot():
    (chart,) = charts(line_chart("score", "round", [Line("a", [(0, 5.0)], "c0")]))
    (line,) = lines_of(chart)
    assert line.get("stroke-linecap") == "round"
    assert len(set(line.get("points").split())) == 1


def test_bars_are_stacked():
    (chart,) = charts(stacked_bars("time", "round", {1: {"train": 3.0, "save": 1.0}}))
    low, high = chart.findall("rect")
    pixels = 254 - 12
    assert float(low.get("height")) == pytest.approx(pixels * 3 / 4, abs=0.1)
    assert float(high.get("height")) == pytest.approx(pixels / 4, abs=0.1)
    assert float(high.get("y")) + float(high.get("height")) == float(low.get("y"))
    assert low.find("title").text == "1, train: 3"


def test_gates_are_coloured_by_their_distance_from_one_half():
    gates = {"ann": {"model.0.q": 0.5, "model.1.q": 0.75}, "bob": {"model.1.q": 0.2}}
    html = heat_map("gates", gates)
    (chart,) = charts(html)
    cells = [rect for rect in chart.findall("rect") if rect.find("title") is not None]
    shown = [(c.find("title").text, c.get("class"), c.get("fill-opacity")) for c in cells]
    assert shown == [
        ("ann, model.0.q: 0.500", "c0", "0.00"),
        ("ann, model.1.q: 0.750", "c4", "0.83"),  # 0.25 of a reach of 0.3
        ("bob, model.1.q: 0.200", "c0", "1.00"),
    ]
    # the layers' common beginning is left out
    assert [label.text for label in chart.findall("text")] == ["0.q", "1.q", "ann", "bob"]
    assert re.findall(r"</svg>([\d.]+)</span>", html) == ["0.2", "0.5", "0.8"]
    assert heat_map("gates", {}) == heat_map("gates", {"ann": {}}) == ""


def test_ticks_are_round_and_hold_the_range():
    assert _ticks(0, 4.4) == [0, 1, 2, 3, 4, 5]
    assert _ticks(12.2, 74.8) == [0, 20, 40, 60, 80]
    assert _ticks(100, 100) == [80, 100]
    assert _ticks(0, 2, whole=True) == [0, 1, 2]
    assert _ticks(0, 0) == [0, 0.2]
    for low, high in ((0.1, 0.1003), (-3, 12345), (99.2, 100), (0, 1e-6)):
        ticks = _ticks(low, high)
        assert ticks[0] <= low
        assert ticks[-1] >= high
        assert 2 <= len(ticks) <= 9


def test_a_table_keeps_its_sums_out_of_the_sorting():
    html = sheet_html(Sheet(["client", "n"], [["ann", "1"], ["bob", "2"]], [["mean", "1.5"]]))
    reader = Reader(html)
    assert reader.count("tr") == 4
    assert re.search(r"</tbody><tfoot><tr><th[^>]*>mean</th><td>1.5</td></tr></tfoot>", html)


def test_columns_line_up():
    assert table(("a", "number"), [["long name", "1"]]) == (
        "| a         | number |\n|-----------|-------:|\n| long name |      1 |"
    )
    # a wide character takes two cells, and a bar in a name is no column
    assert table(("a", "n"), [["株", "1"], ["b|c", "2"]]).splitlines() == [
        "| a    | n |",
        "|------|--:|",
        "| 株   | 1 |",
        "| b\\|c | 2 |",
    ]


def test_a_table_too_wide_for_a_terminal_goes_on_below():
    sheet = Sheet(["client", "a" * 60, "b" * 60], [["ann", "1", "2"]], [["mean", "1", "2"]], fold=2)
    upper, lower = sheet_text(sheet).split("\n\n")
    assert upper.splitlines()[2:] == [f"| ann    | {'1':>60} |", f"| mean   | {'1':>60} |"]
    assert lower.splitlines()[2:] == [f"| ann    | {'2':>60} |", f"| mean   | {'2':>60} |"]
