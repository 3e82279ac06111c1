"""Page and text tables: well formed, escaped, complete for one client or a hundred."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from fedalt.report.page import sheet_html, text
from fedalt.report.report import answers_in, run_page
from fedalt.report.summary import summarise
from fedalt.report.tables import Sheet, console_text, shorten, table

VOID = {"meta", "br"}
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
    assert facts[:7] == [
        ("method", "fedalt"),
        ("clients", "2"),
        ("rounds", "3"),
        ("mean ROUGE-1", "0.5 → 30.5"),
        ("wall time", "12.0 s"),
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
            assert given["scope"] in ("col", "row", "colgroup")
    assert reader.count("thead") == reader.count("table") == 2
    classes = [given.get("class") for tag, given in reader.tags if tag in ("div", "p")]
    assert classes.count("scrolls") == classes.count("hint across") == 2  # where it goes on


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
        names = [label.text for label in curves.findall("text[@class='name']")]
        assert sorted(names) == ["mean", "worst: client-0"]
    assert len(lines_of(curves)[0].get("points").split()) == max(rounds + 1, 2)


def test_a_running_run_without_times_or_a_base():
    html, _ = page_of(events_of(["ann", "bob"], 2, first_round=2), finished=False)
    assert "<dd>2 so far</dd>" in html
    assert "<dd>- → 20.5</dd>" in html
    assert "<dt>wall time</dt><dd>-</dd>" in html
    assert "By ROUGE-1, so far, in round 2, the base before training was not scored." in html


def test_a_client_without_scores_has_its_row():
    events = [*events_of(["ann"], 2), {"event": "fail", "round": 1, "client": "zoe", "reason": "x"}]
    html, _ = page_of(events)
    assert '<th scope="row">zoe</th><td>-</td>' in html


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


def width(text):
    return max(map(len, text.splitlines()))


def test_a_terminal_shows_the_columns_that_matter_within_80_characters():
    header = ["client", "a" * 40, "b" * 40, "c" * 10, "d"]
    sheet = Sheet(header, [["ann", "1", "2", "3", "4"]], [["mean", *"1234"]], order=[2, 1, 3, 4])
    lines = console_text(sheet).splitlines()
    assert lines[0] == f"| client | {'b' * 40} | {'c' * 10} | d |"
    assert lines[2].split() == ["|", "ann", "|", "2", "|", "3", "|", "4", "|"]
    assert len(lines) == 4


@pytest.mark.parametrize("name", ["x" * 200, "株" * 50, "a|" * 40, "client-with-a-long-name-17"])
def test_long_names_lose_their_middle_in_a_terminal(name):
    sheet = Sheet(["client", *["score"] * 6], [[name, *["12.3"] * 6]])
    text = console_text(sheet)
    assert width(text) <= 80
    assert "…" in text
    assert "12.3" in text
    assert name in sheet_html(sheet)


def test_a_name_is_cut_to_its_ends():
    assert shorten("summarise-news-of-hospital-17", 12) == "summa…tal-17"
    assert shorten("short", 12) == "short"
    assert shorten("株" * 10, 7) == "株…株株"


def test_heads_have_two_lines_of_which_the_upper_spans_its_columns():
    heads = [("", "client"), ("ROUGE-1", "base"), ("ROUGE-1", "individual alone"), ("", "gate")]
    html = sheet_html(Sheet(["client", "a", "b", "c"], [["ann", "1", "2", "3"]], heads=heads))
    upper, lower = re.findall("<tr>(.*?)</tr>", html)[:2]
    assert re.findall(r'colspan="(\d)">(?:<span>(.*?)</span>)?</th>', upper) == [
        ("1", ""),
        ("2", "ROUGE-1"),
        ("1", ""),
    ]
    titles = re.findall(r"<th scope=\"col\">(.*?)</th>", lower)
    assert titles == ["client", "base", "individual<br>alone", "gate"]


ANSWERS = [
    {
        "event": "answers",
        "round": number,
        "client": client,
        "train": 8,
        "test": 2,
        "scores": [0.0, 50.0],
        "shown": [
            {"asked": "Note\nHow <many>?", "gold": "two & <b>", "given": given},
            {"asked": "And now?", "gold": "three", "given": "three"},
        ],
    }
    for client in ("ann", "bob")
    for number, given in ((0, "none"), (3, f"<i>{client}</i>"))
]


def test_questions_are_shown_with_right_base_and_last_answers():
    events = [*events_of(["ann", "bob"], 3), *ANSWERS]
    html = run_page("a run", summarise(events), [], "", True, answers_in(events))
    Reader(html)
    assert "<i>" not in html
    folded = r"<details( open)?><summary>(?:ann|bob)</summary>(.*?)</details>"
    ann, bob = re.findall(folded, html, re.DOTALL)
    assert (ann[0], bob[0]) == (" open", "")
    heads = re.findall(r'<th scope="col">(.*?)</th>', ann[1])
    assert heads == ["question", "right<br>answer", "base<br>(round 0)", "mixed<br>(round 3)"]
    cells = re.findall(r"<td>(.*?)</td>", ann[1], re.DOTALL)
    assert cells[:3] == ["two &amp; &lt;b&gt;", "none", "&lt;i&gt;ann&lt;/i&gt;"]
    assert '<th scope="row">Note\nHow &lt;many&gt;?</th>' in ann[1]
    assert "640 train" not in html
    assert "<dt>records</dt><dd>16 train, 4 test</dd>" in html


def test_a_page_names_what_was_run_and_by_what():
    start = {"round": 0, "phase": "start", "client": "", "seconds": 1.0, "device": "cpu"}
    start |= {"date": "2026-01-02T03:04:05+00:00", "python": "3.12.1", "fedalt": "0.1"}
    start |= {"torch": "2.11", "transformers": "5.17"}
    again = start | {"round": 2, "date": "2026-01-03T00:00:00+00:00", "torch": "2.12"}
    config = (
        "method: fedalt\nseed: 7\nmodel: {path: m/x, dtype: bfloat16, quantization: nf4}\n"
        "data: {path: d/y, kind: text}\nlora: {rank: 4, alpha: 8.0}\ntrain: {max_steps: 30}\n"
    )
    html, _ = page_of(events_of(["ann", "bob"], 3), [start, again], config)
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert facts["model"] == "m/x, bfloat16, nf4"
    assert facts["data"] == "d/y"
    assert facts["seed"] == "7"
    assert facts["rounds"] == "3, 30 steps each"
    assert facts["device"] == "cpu"
    assert facts["date"] == "2026-01-02 03:04 to 2026-01-03 00:00"
    assert facts["versions"] == (
        "fedalt 0.1, torch 2.11, transformers 5.17, Python 3.12.1; "
        "fedalt 0.1, torch 2.12, transformers 5.17, Python 3.12.1"
    )
    assert facts["wall time"] == "2.0 s"


def test_words_that_are_not_in_a_table_are_not_explained():
    html, _ = page_of(events_of(["ann", "bob"], 3))
    terms = html.partition('<dl class="terms">')[2].partition("</dl>")[0]
    assert "<dt>gate</dt>" in terms
    assert "<dt>mean, worst, spread</dt>" in terms
    assert "<dt>alone</dt>" not in terms
    assert "<dt>95 % interval</dt>" not in terms
    assert "<dt>accuracy</dt>" not in terms
