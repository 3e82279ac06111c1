"""Every setting in words, out of the dataclasses' own source."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, get_type_hints

from fedalt.config.schema import Config
from fedalt.errors import InputError

WIDTH = 80


class Setting(NamedTuple):
    """One setting: its dotted key, its type and default in YAML's words, and its docstring."""

    key: str
    kind: str
    default: str
    text: str


class Section(NamedTuple):
    """A group of settings; that of the run itself has no name."""

    name: str
    text: str
    settings: list[Setting]


def list_settings(wanted: str = "", markdown: bool = False) -> str:
    """The settings with type, default and meaning, for a terminal or as ``docs/settings.md``.

    Args:
        wanted: only these: a section, a dotted key or the last word of one; empty: all.

    Raises:
        InputError: nothing is called that.
    """
    sections = list(_sections())
    chosen = []
    for section in sections:
        settings = section.settings
        if wanted not in ("", section.name):
            settings = [s for s in settings if wanted in (s.key, _leaf(s.key))]
        if settings:
            chosen.append(section._replace(settings=settings))
    if not chosen:
        names = [s.name for s in sections] + [s.key for part in sections for s in part.settings]
        leaves = {_leaf(name): name for name in names}
        near = difflib.get_close_matches(wanted, names, n=1)
        near = near or [leaves[leaf] for leaf in difflib.get_close_matches(wanted, leaves, n=1)]
        hint = f"did you mean {near[0]}?" if near else "fedalt settings lists all"
        raise InputError(f"no setting is called {wanted!r}; {hint}")
    return _markdown(chosen) if markdown else _text(chosen)


def _sections(cls: type = Config, name: str = "") -> Iterator[Section]:
    """The fields of a dataclass of settings, then those of the dataclasses in it."""
    defaults, kinds, settings, inner = Config().flat(), get_type_hints(cls), [], []
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    for node, after in pairwise([*tree.body, None]):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        field = node.target.id
        if dataclasses.is_dataclass(kinds[field]):
            inner.append((kinds[field], field))
            continue
        key = f"{name}.{field}" if name else field
        default = json.dumps(defaults[key], ensure_ascii=False)
        settings.append(Setting(key, _kind(node.annotation), default, _string(after)))
    yield Section(name, _words(inspect.getdoc(cls) or ""), settings)
    for kind, field in inner:
        yield from _sections(kind, field)


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _kind(annotation: ast.expr) -> str:
    """A type as YAML has it: tuples are lists, None is null."""
    words = re.sub(r"tuple\[(\w+), \.\.\.\]", r"list[\1]", ast.unparse(annotation))
    return words.replace("None", "null")


def _string(node: ast.stmt | None) -> str:
    """The docstring that follows a field, if it has one."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return _words(str(node.value.value))
    return ""


def _words(docstring: str) -> str:
    return " ".join(docstring.replace("``", "`").split())


def _text(sections: list[Section]) -> str:
    blocks = []
    for name, text, settings in sections:
        blocks.append(_filled(f"{name}: {text}" if name else text, ""))
        for key, kind, default, meaning in settings:
            block = f"  {key} ({kind}, default {default})"
            blocks.append(f"{block}\n{_filled(meaning, '      ')}" if meaning else block)
    return "\n\n".join(blocks)


def _filled(text: str, indent: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def _markdown(sections: list[Section]) -> str:
    lines = [
        "# Settings",
        "",
        "Each is a line of a config's YAML or `-c key.path=value`; `fedalt settings KEY` tells of "
        "one. Made by `fedalt settings --markdown`.",
    ]
    for name, text, settings in sections:
        lines += ["", f"## {name or 'The run'}", "", text, ""]
        for key, kind, default, meaning in settings:
            tail = f": {meaning}" if meaning else ""
            lines.append(f"- **`{key}`** (`{kind}`, default `{default}`){tail}")
    return "\n".join(lines)
