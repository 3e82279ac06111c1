"""The ``fedalt`` command.

Exit status: 0 done, 1 failed, 2 bad input, 130 interrupted, 141 nobody reads what it prints.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from transformers.utils import logging as transformers_logging

from fedalt.config import Config, list_settings, load_config
from fedalt.errors import InputError, InputWarning, RunFailed, whole_streams
from fedalt.flower import bring_up, init_app
from fedalt.memory import foretell
from fedalt.report import write_report, write_tensorboard
from fedalt.run import Federation, compare, join_run
from fedalt.serving import evaluate_run, export_client, export_flat, serve
from fedalt.store import CONFIG
from fedalt_kernels import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    try:
        with whole_streams():
            return _answer(arguments)
    except BrokenPipeError:  # quietly, with the status of a command that SIGPIPE ended
        return 141
    except OSError as error:
        return _refuse(error)


def _answer(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    options.cure = "nothing was lost"
    transformers_logging.disable_progress_bar()  # one bar at a time: the run's own
    try:
        with _warning_in_one_line():
            options.command(options)
    except InputError as error:
        print(f"fedalt: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        return _refuse(error)
    except RunFailed as error:
        print(f"fedalt: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"fedalt: interrupted; {options.cure}", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _warning_in_one_line() -> Iterator[None]:
    """What is left aside of the input is told as errors are, without the line of code."""
    usual = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, InputWarning):
            print(f"fedalt: {message}", file=sys.stderr)
        else:
            usual(message, category, *where, **more)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _refuse(error: OSError) -> int:
    """Of a disk that is full or read-only, mostly."""
    where = f"{error.filename}: " if error.filename else ""
    print(f"fedalt: {where}{error.strerror or error}", file=sys.stderr)
    return 2


def _run(options: argparse.Namespace) -> None:
    federation = Federation(_config(options))
    out = federation.config.out
    try:
        result = federation.run(resume=options.resume)
    except KeyboardInterrupt:
        if (Path(out) / CONFIG).is_file():
            options.cure = f"go on with: fedalt run --out {shlex.quote(out)} --resume"
        raise
    _show(result.table, result.page)


def _compare(options: argparse.Namespace) -> None:
    seeds = [_whole_number(seed, "--seeds") for seed in options.seeds.split(",")]
    jobs = _whole_number(options.jobs, "--jobs")
    options.cure = "go on with the same command and --resume"
    _show(*compare(_config(options), options.methods.split(","), seeds, jobs, options.resume))


def _memory(options: argparse.Namespace) -> None:
    print(foretell(_config(options)))


def _settings(options: argparse.Namespace) -> None:
    print(list_settings(options.key, options.markdown))


def _evaluate(options: argparse.Namespace) -> None:
    print(evaluate_run(options.run, options.client, options.data))


def _join(options: argparse.Namespace) -> None:
    epochs = _whole_number(options.epochs, "--epochs") if options.epochs else None
    print(join_run(options.run, options.data, epochs))


def _export(options: argparse.Namespace) -> None:
    if options.flat:
        print(export_flat(options.run, options.client, options.to, options.data))
        return
    folder = export_client(options.run, options.client, options.to)
    print(f"{options.client}: PEFT adapters and mixer in {folder}")


def _serve(options: argparse.Namespace) -> None:
    options.cure = "the clients are as they were"
    serve(options.run, options.host, _whole_number(options.port, "--port"))


def _report(options: argparse.Namespace) -> None:
    out = Path(options.run)
    config = load_config(out / CONFIG)
    _show(*write_report(out, f"{config.method} on {config.data.name}"))
    if options.tensorboard:
        print(f"TensorBoard events: {write_tensorboard(out)}")


def _flower(options: argparse.Namespace) -> None:
    options.help()


def _init(options: argparse.Namespace) -> None:
    print(init_app(options.folder))


def _up(options: argparse.Namespace) -> None:
    options.cure = "the same command goes on"
    _show(*bring_up(_config(options), Path(options.folder)))


def _show(table: str, page: Path) -> None:
    print(table)
    print(f"report: {page}")


def _config(options: argparse.Namespace) -> Config:
    """The config the options ask for; a resume without CONFIG starts from the run's own."""
    path, saved = options.config, Path(options.out) / CONFIG
    if options.resume and path is None and options.out and saved.is_file():
        path = saved
    elif options.resume and not (path or options.data or options.settings):
        raise InputError(
            f"--resume: no run in {options.out or 'the current folder'}; name it with --out"
        )
    config = load_config(path, tuple(options.settings))
    if options.data:
        config = replace(config, data=replace(config.data, path=options.data))
    if options.resume and not (options.out or config.out):
        raise InputError("--resume wants the run directory: name it with --out")
    return replace(config, out=options.out or config.out)


def _whole_number(text: str, option: str) -> int:
    if not text.isdecimal():
        raise InputError(f"{option}: wants a whole number, got {text!r}")
    return int(text)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where to look."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fedalt: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fedalt",
        description="Personalised federated fine-tuning with mixed LoRAs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_examples(
            "fedalt run                                  # the built-in sample",
            "fedalt run --data DIR --out runs/mine       # your clients, a folder each",
            "fedalt run llama2-7b-flan -c data.path=DIR  # settings by name",
        ),
    )
    parser.add_argument("--version", action="version", version=_versions())
    parser.set_defaults(command=lambda options: parser.print_help())
    commands = parser.add_subparsers(metavar="COMMAND")

    run = _command(
        commands,
        _run,
        "train a federation and print its clients' scores",
        "fedalt run digits -c rounds=3",
        "fedalt run --data DIR --out runs/mine",
        "fedalt run --out runs/mine --resume    # killed? this goes on",
    )
    _add_config(run)

    several = _command(
        commands,
        _compare,
        "run several methods on the same data and seeds",
        "fedalt compare digits --methods fedalt,local --seeds 0,1,2",
        "fedalt compare --data DIR --out runs/all --jobs 2 -c threads=1",
    )
    _add_config(several)
    several.add_argument("--methods", default="fedalt,fedit,fedit+ft,local", help="names, by comma")
    several.add_argument("--seeds", default="0,1,2", help="whole numbers, by comma")
    several.add_argument("--jobs", default="1", help="runs at a time, each in a process")

    memory = _command(
        commands,
        _memory,
        "what memory a run will need, told beforehand",
        "fedalt memory llama2-7b-flan -c data.path=DIR",
        "fedalt memory --data DIR -c model.path=CHECKPOINT -c model.quantization=nf4",
    )
    _add_settings(memory)
    memory.set_defaults(out="", resume=False)

    settings = _command(
        commands,
        _settings,
        "list settings with type, default and meaning",
        "fedalt settings train",
        "fedalt settings lora.target_modules",
    )
    settings.add_argument("key", nargs="?", default="", metavar="KEY", help="a section or setting")
    settings.add_argument("--markdown", action="store_true", help="as in docs/settings.md")

    evaluate = _command(
        commands,
        _evaluate,
        "score a run's clients afresh",
        "fedalt evaluate runs/mine",
        "fedalt evaluate runs/mine --client ID --data OTHER_RECORDS",
    )
    evaluate.add_argument("run", metavar="RUN", help="a run directory")
    evaluate.add_argument("--client", default="", help="only this client")
    evaluate.add_argument("--data", default="", help="other records of the same clients")

    join = _command(
        commands,
        _join,
        "fit unseen clients into a run",
        "fedalt join runs/mine --data NEW_CLIENT",
        "fedalt join runs/mine --data NEW_CLIENTS --epochs 3",
    )
    join.add_argument("run", metavar="RUN", help="a run directory")
    join.add_argument("--data", required=True, help="one client's folder, or a folder of them")
    join.add_argument("--epochs", default="", help="passes over their records; default: the run's")

    export = _command(
        commands,
        _export,
        "write a client's adapters in PEFT's file format",
        "fedalt export runs/mine ID --to adapters/ID",
        "fedalt export runs/mine ID --to adapters/ID --flat    # one plain LoRA",
        "python -c 'import fedalt; model, tokenizer = fedalt.load_export(\"adapters/ID\")'",
    )
    export.add_argument("run", metavar="RUN", help="a run directory")
    export.add_argument("client", metavar="CLIENT", help="a client's id")
    export.add_argument("--to", required=True, help="a new folder")
    export.add_argument("--flat", action="store_true", help="one plain LoRA, mean gates folded in")
    export.add_argument("--data", default="", help="for --flat: records that are not the run's own")

    server = _command(
        commands,
        _serve,
        "answer for a run's clients over HTTP, by OpenAI's protocol",
        "fedalt serve runs/mine --port 8000",
        "fedalt serve runs/mine --host 0.0.0.0    # for other machines as well",
    )
    server.add_argument("run", metavar="RUN", help="a run directory")
    server.add_argument(
        "--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone"
    )
    server.add_argument("--port", default="8000", help="default: 8000")

    report = _command(
        commands,
        _report,
        "tables and page of a finished or running run",
        "fedalt report runs/mine",
        "fedalt report runs/mine --tensorboard",
    )
    report.add_argument("run", metavar="RUN", help="a run directory")
    report.add_argument("--tensorboard", action="store_true", help="write its events as well")
    _add_flower(commands)
    return parser


def _add_flower(commands: Any) -> None:
    flower = _command(
        commands,
        _flower,
        "clients on machines of their own, on Flower (an extra, flower)",
        "fedalt flower up /tmp/try --data DIR  # see it all on this machine",
        "fedalt flower init app                # for machines of their own: docs/sites.md",
    )
    flower.set_defaults(help=flower.print_help)
    inner = flower.add_subparsers(metavar="COMMAND")
    init = _command(
        inner,
        _init,
        "write the app that Flower sends to sites, and print the commands",
        "fedalt flower init app",
    )
    init.add_argument("folder", metavar="DIR", help="a new folder")
    up = _command(
        inner,
        _up,
        "start SuperLink and a SuperNode a client on this machine, run, and stop them",
        "fedalt flower up /tmp/try -c rounds=2",
        "fedalt flower up /tmp/try --data DIR -c federation.secure=true",
    )
    up.add_argument("folder", metavar="DIR", help="where all of it is kept")
    _add_settings(up)
    up.set_defaults(out="", resume=False)


def _command(
    commands: Any, run: Callable[[argparse.Namespace], None], what: str, *examples: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        run.__name__.removeprefix("_"),
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_examples(*examples),
    )
    parser.set_defaults(command=run)
    return parser


def _examples(*lines: str) -> str:
    return "\n  ".join(("examples:", *lines))


def _versions() -> str:
    """This package's version and those of what it computes with, none of which is imported."""
    found = [f"Python {platform.python_version()}"]
    for package in ("torch", "transformers", "triton"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return f"fedalt {__version__} ({', '.join(found)})"


def _add_config(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser)
    parser.add_argument("--out", default="", help="the run directory")
    parser.add_argument("--resume", action="store_true", help="go on where the run was cut short")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    ready = "a file, or the name of a ready config such as digits; default: the sample"
    parser.add_argument("config", nargs="?", metavar="CONFIG", help=ready)
    parser.add_argument(
        "--data", default="", help="a folder with one folder a client, or a dataset"
    )
    parser.add_argument(
        "-c",
        dest="settings",
        action="append",
        default=[],
        metavar="key.path=value",
        help="one setting over the config's, such as -c train.batch_size=8; "
        "`fedalt settings` lists them",
    )
