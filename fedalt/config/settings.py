"""Settings in: YAML and ``key.path=value`` laid over the defaults, each key checked by name."""

from __future__ import annotations

import dataclasses
import difflib
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from fedalt.config.schema import Config
from fedalt.errors import InputError

READY = Path(__file__).parents[1] / "assets" / "configs"
"""The configs that come with the package, known by their names."""


def load_config(path: str | Path | None = None, overrides: tuple[str, ...] = ()) -> Config:
    """Read a YAML file (none: all defaults), lay ``key.path=value`` overrides over it, check all.

    Args:
        path: of a file, or the name of a ready config, such as ``llama2-7b-flan``.

    Raises:
        InputError: the file is missing or no YAML mapping, or a key or value is not known.
    """
    settings: dict[str, Any] = {}
    where = "config"
    if path is not None:
        where = str(path)
        try:
            loaded = yaml.safe_load(_file_of(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: cannot read the config: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InputError(f"{path}: not UTF-8 text; save the config as UTF-8") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f"{mark.line + 1}: " if mark else " "
            problem = getattr(error, "problem", None) or "not readable"
            raise InputError(f"{path}:{line}broken YAML: {problem}") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise InputError(f"{path}: wants a mapping of settings, got {type(loaded).__name__}")
        settings = loaded or {}
    for override in overrides:
        _apply_override(settings, override)
    try:
        return config_from_dict(settings)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _file_of(path: str | Path) -> Path:
    """``path`` itself, or the ready config that a single word names; a file of that name wins."""
    file, word = Path(path), str(path)
    if file.is_file() or file.suffix or len(file.parts) != 1:
        return file
    ready = {known.stem: known for known in sorted(READY.glob("*.yaml"))}
    if word not in ready:
        near = difflib.get_close_matches(word, ready, n=1)
        hint = f"did you mean {near[0]}? known" if near else "known"
        raise InputError(f"{word}: no such file and no ready config; {hint}: {', '.join(ready)}")
    return ready[word]


def config_from_dict(settings: dict[str, Any]) -> Config:
    """Build a ``Config`` from nested dicts; unknown keys and wrong types raise ``InputError``."""
    return _build(Config, settings, prefix="")


def _apply_override(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"-c {override}: wants key.path=value, such as -c train.batch_size=8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"-c {override}: the value is not readable as YAML") from None
    *parents, last = key.split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {})
        if not isinstance(settings, dict):
            raise InputError(f"-c {override}: {parent!r} holds a value, not a group of settings")
    settings[last] = value


def _build(cls: type, settings: dict[str, Any], prefix: str) -> Any:
    hints = get_type_hints(cls)
    values = {}
    for key, value in settings.items():
        if key not in hints:
            raise InputError(f"unknown key {prefix}{key}{_nearest(str(key), prefix)}")
        kind = hints[key]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            if not isinstance(value, dict):
                raise InputError(f"{prefix}{key} must be a group of settings, got {value!r}")
            values[key] = _build(kind, value, prefix=f"{key}.")
        else:
            values[key] = _coerce(kind, value, prefix + key)
    return cls(**values)


def _nearest(key: str, prefix: str) -> str:
    """A hint at the key that was meant: of the same group first, then a leaf of any other."""
    known = list(Config().flat())
    siblings = [name for name in known if prefix and name.startswith(prefix)]
    leaves = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(prefix + key, siblings, n=1, cutoff=0.8)
    near = near or [leaves[leaf] for leaf in difflib.get_close_matches(key, leaves, n=1)]
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(siblings or known)}"


def _coerce(kind: Any, value: Any, key: str) -> Any:
    """``value`` as ``kind``; an int may stand for a float, and one word for a list of one where
    text is nothing else.
    """
    if get_origin(kind) in (Union, types.UnionType):
        if value is None:
            return None
        kinds = [option for option in get_args(kind) if option is not type(None)]
        kind = next((option for option in kinds if option is type(value)), kinds[-1])
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise InputError(f"{key} must be a mapping, got {value!r}")
        inner = get_args(kind)[1]
        return {str(name): _coerce(inner, item, f"{key}.{name}") for name, item in value.items()}
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        items = value if isinstance(value, list | tuple) else [value]
        if all(isinstance(item, inner) and not isinstance(item, bool) for item in items):
            return tuple(items)
        names = {str: "names", int: "whole numbers"}
        raise InputError(f"{key} must be a list of {names[inner]}, got {value!r}")
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 3e-4 as text
        try:
            return float(value)
        except ValueError:
            raise InputError(f"{key} must be a number, got {value!r}") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise InputError(f"{key} must be {names[kind]}, got {value!r}")
    return value
