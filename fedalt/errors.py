"""The one exception that means: what you gave cannot be used."""


class InputError(ValueError):
    """Bad input, told in one line that names the file, the line or field, and the cure.

    The command line prints the message on standard error and exits with status 2.
    """


class RunFailed(RuntimeError):
    """A process of a comparison ended with an error; the message has its last line."""
