"""What an HTML page of results is made of: no network, no library.

Colours follow the reader's light or dark setting. All text from outside passes ``text``.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import groupby

from fedalt.report import tables

RESOURCES = ("style.css", "script.js")


def text(value: object) -> str:
    """Any value as HTML that shows it and does nothing else."""
    return html.escape(tables.printable(str(value)))


def lines(value: str) -> str:
    """A text of several lines, as HTML."""
    return "\n".join(map(text, value.splitlines()))


def document(
    title: str, verdict: str, facts: Mapping[str, str], sections: Sequence[str], config: str
) -> str:
    """The whole page.

    Args:
        title: of the page.
        verdict: what was found, in words.
        facts: short values by name.
        sections: HTML.
        config: YAML.
    """
    style, script = (files(__package__).joinpath(n).read_text("utf-8") for n in RESOURCES)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{text(title)}</title>'
        f"<style>\n{style}</style></head>\n<body><main><h1>{text(title)}</h1>\n"
        f'<p class="verdict">{text(verdict)}</p>\n{named("facts", facts)}\n'
        + "\n".join(section for section in sections if section)
        + '\n<details class="config"><summary>config.yaml</summary>'
        + f"<pre>{lines(config)}</pre></details>\n</main>"
        + f"<script>\n{script}</script></body></html>\n"
    )


def named(kind: str, values: Mapping[str, str]) -> str:
    """Values or explanations by what they are called; ``kind`` is a CSS class."""
    rows = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in values.items())
    return f'<dl class="{kind}">{rows}</dl>' if rows else ""


def section(title: str, *parts: str) -> str:
    """A heading and what belongs to it; nothing where there is nothing."""
    body = "".join(parts)
    return f"<section><h2>{text(title)}</h2>{body}</section>" if body else ""


def figures(*charts: str) -> str:
    """Charts side by side where there is room."""
    return f'<div class="figures">{"".join(charts)}</div>' if any(charts) else ""


def folded(title: str, body: str, unfolded: bool = False) -> str:
    """A part that opens by a click on its title."""
    return f"<details{' open' * unfolded}><summary>{text(title)}</summary>{body}</details>"


def sheet_html(sheet: tables.Sheet, words: bool = False) -> str:
    """A table that can be sorted by any column; ``words`` when its cells are not numbers."""

    def row(cells: Sequence[str]) -> str:
        tail = "".join(f"<td>{lines(value)}</td>" for value in cells[1:])
        whole = f' title="{text(cells[0])}"' if not words and len(cells[0]) > tables.NAME else ""
        return f'<tr><th scope="row"{whole}>{lines(cells[0])}</th>{tail}</tr>'

    kind = "sortable words" if words else "sortable"
    foot = f"<tfoot>{''.join(map(row, sheet.foot))}</tfoot>" if sheet.foot else ""
    return (
        '<div class="scrolls"><p class="hint across" aria-hidden="true">scroll sideways for more →'
        '</p><p class="hint down" aria-hidden="true">scroll down for more ↓</p>'
        f'<div class="wide" tabindex="0"><table class="{kind}"><thead>{_head(sheet)}</thead>'
        f"<tbody>{''.join(map(row, sheet.rows))}</tbody>{foot}</table></div></div>"
    )


def _head(sheet: tables.Sheet) -> str:
    """One line of titles, or above it a second one of what the columns belong to."""
    titles = [title for _, title in sheet.heads] or sheet.header
    broken = (text(title).replace(" ", "<br>", 1) for title in titles)
    lower = "".join(f'<th scope="col">{title}</th>' for title in broken)
    upper = ""
    for group, own in groupby(group for group, _ in sheet.heads):
        wide = len(list(own))
        name = f"<span>{text(group)}</span>" if group else ""
        upper += f'<th scope="colgroup" class="group" colspan="{wide}">{name}</th>'
    return f"<tr>{upper}</tr><tr>{lower}</tr>" if upper else f"<tr>{lower}</tr>"
