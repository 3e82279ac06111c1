"""What the command line tells in one line: bad input, and runs that could not go on."""


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
