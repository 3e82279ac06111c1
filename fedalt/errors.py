"""What the command line tells in one line: bad input, and runs that could not go on; and where its
output cannot be written."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


class InputError(ValueError):
    """Bad input, told in one line that names the file, the line or field, and the cure.

    The command line prints the message on standard error and exits with status 2.
    """


class InputWarning(UserWarning):
    """Something of the input that is left aside, told in one line; the command line prints it."""


class RunFailed(RuntimeError):
    """A run could not go on: no client could train, or a process of a comparison failed.

    The command line prints the message on standard error and exits with status 1.
    """


def not_installed(wanted_by: str, package: str, extra: str) -> InputError:
    """The error of whatever needs a ``package`` that comes with an extra of this one."""
    return InputError(f"{wanted_by} wants {package}: pip install 'fedalt[{extra}]'")


def first_line(error: Exception) -> str:
    """What an exception says in its first line, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def require(condition: bool, key: str, wanted: str, got: object) -> None:
    """Raises InputError, which tells what the setting ``key`` must be, unless it holds."""
    if not condition:
        raise InputError(f"{key} must be {wanted}, got {got!r}")


def require_one_of(known: tuple[str, ...], key: str, got: str) -> None:
    """Raises InputError unless the setting ``key`` is a known one."""
    require(got in known, key, f"one of {', '.join(known)}", got)


def require_count_or_auto(key: str, got: object) -> None:
    """Raises InputError unless the setting ``key`` is ``auto`` or a whole number of at least 1."""
    require(got == "auto" or (type(got) is int and got >= 1), key, "at least 1, or auto", got)


def require_encodable(text: str, what: str) -> None:
    """Raises InputError, which begins with ``what``, for text with half of a surrogate pair in it.

    JSON and YAML can spell one (``\\ud800``), but no tokenizer, file or terminal takes it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} holds {text[error.start]!r} at character {error.start + 1}, half of a "
            "surrogate pair, which no encoding takes; remove it"
        ) from None


@contextmanager
def whole_streams() -> Iterator[None]:
    """Output that may be closed, read by nobody, or in an encoding that lacks a letter."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell's >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  until the process ends
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # stderr escapes such letters by itself
    try:
        yield
    finally:
        failed = [error for stream in (sys.stdout, sys.stderr) if (error := _flush(stream))]
        if failed:
            raise failed[0]


def _flush(stream: TextIO) -> OSError | None:
    """The error, if any; what could not be written is dropped, or Python would try at exit."""
    try:
        stream.flush()
    except OSError as error:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None
