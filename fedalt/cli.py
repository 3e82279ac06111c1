"""The ``fedalt`` command. Exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from transformers.utils import logging as transformers_logging

from fedalt.config import Config, load_config
from fedalt.errors import InputError, InputWarning, RunFailed
from fedalt.memory import foretell
from fedalt.report import write_report, write_tensorboard
from fedalt.run import Federation, compare, join_run
from fedalt.serving import evaluate_run, export_client
from fedalt.store import CONFIG


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    options = _parser().parse_args(arguments)
    options.cure = "nothing was lost"
    transformers_logging.disable_progress_bar()  # one bar at a time: the run's own
    try:
        with _warning_in_one_line():
            options.command(options)
    except InputError as error:
        print(f"fedalt: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a disk that is full or read-only, mostly
        where = f"{error.filename}: " if error.filename else ""
        print(f"fedalt: {where}{error.strerror or error}", file=sys.stderr)
        return 2
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


def _evaluate(options: argparse.Namespace) -> None:
    print(evaluate_run(options.run, options.client, options.data))


def _join(options: argparse.Namespace) -> None:
    epochs = _whole_number(options.epochs, "--epochs") if options.epochs else None
    print(join_run(options.run, options.data, epochs))


def _export(options: argparse.Namespace) -> None:
    folder = export_client(options.run, options.client, options.to)
    print(f"{options.client}: PEFT adapters and mixer in {folder}")


def _report(options: argparse.Namespace) -> None:
    out = Path(options.run)
    config = load_config(out / CONFIG)
    _show(*write_report(out, f"{config.method} on {config.data.name}"))
    if options.tensorboard:
        print(f"TensorBoard events: {write_tensorboard(out)}")


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
        prog="fedalt", description="Personalised federated fine-tuning with mixed LoRAs."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="train a federation and print its clients' scores")
    _add_config(run)
    run.set_defaults(command=_run)

    several = commands.add_parser("compare", help="run several methods on the same data and seeds")
    _add_config(several)
    several.add_argument("--methods", default="fedalt,fedit,fedit+ft,local", help="names, by comma")
    several.add_argument("--seeds", default="0,1,2", help="whole numbers, by comma")
    several.add_argument("--jobs", default="1", help="runs at a time, each in a process")
    several.set_defaults(command=_compare)

    memory = commands.add_parser("memory", help="what memory a run will need, told beforehand")
    _add_settings(memory)
    memory.set_defaults(command=_memory, out="", resume=False)

    evaluate = commands.add_parser("evaluate", help="score a run's clients afresh")
    evaluate.add_argument("run", metavar="RUN", help="a run directory")
    evaluate.add_argument("--client", default="", help="only this client")
    evaluate.add_argument("--data", default="", help="other records of the same clients")
    evaluate.set_defaults(command=_evaluate)

    join = commands.add_parser("join", help="fit unseen clients into a run")
    join.add_argument("run", metavar="RUN", help="a run directory")
    join.add_argument("--data", required=True, help="one client's folder, or a folder of them")
    join.add_argument("--epochs", default="", help="passes over their records; default: the run's")
    join.set_defaults(command=_join)

    export = commands.add_parser("export", help="write a client's adapters in PEFT's file format")
    export.add_argument("run", metavar="RUN", help="a run directory")
    export.add_argument("client", metavar="CLIENT", help="a client's id")
    export.add_argument("--to", required=True, help="a new folder")
    export.set_defaults(command=_export)

    report = commands.add_parser("report", help="tables and page of a finished or running run")
    report.add_argument("run", metavar="RUN", help="a run directory")
    report.add_argument("--tensorboard", action="store_true", help="write its events as well")
    report.set_defaults(command=_report)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser)
    parser.add_argument("--out", default="", help="the run directory")
    parser.add_argument("--resume", action="store_true", help="go on where the run was cut short")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="default: the sample")
    parser.add_argument(
        "--data", default="", help="a folder with one folder a client, or a dataset"
    )
    parser.add_argument(
        "-c",
        dest="settings",
        action="append",
        default=[],
        metavar="key.path=value",
        help="one setting over the config's, such as -c train.batch_size=8",
    )
