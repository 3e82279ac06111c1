"""What the command line tells in one line: bad input, and runs that could not go on."""


class InputError(ValueError):
    """Bad input, told in one line that names the file, the line or field, and the cure.

    The command line prints the message on standard error and exits with status 2.
    """


class RunFailed(RuntimeError):
    """A run could not go on: no client could train, or a process of a comparison failed.

    The command line prints the message on standard error and exits with status 1.
    """
