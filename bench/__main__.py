"""The ``python -m bench`` command.

Exit status: 0 done, 1 a part failed, 2 bad input or a machine that cannot.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from . import roofline
from .report import RESULTS
from .roofline import Ceilings

WHOLE_S = 560.0  # of `gpu`, so that it ends within ten minutes
MODEL_S = 130.0  # kept back for the model
MEMORY_S = 120.0  # and for the memory of a step


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    options = _parser().parse_args(arguments)
    from .device import Unavailable

    try:
        return options.command(options) or 0
    except Unavailable as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"bench: {error}; install {error.name}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130


def _roofline(options: argparse.Namespace) -> None:
    ceilings = Ceilings(bandwidth=1e12 * options.bandwidth, matrix=1e12 * options.matrix)
    roofline.main(options.all, ceilings)


def _kernels(options: argparse.Namespace) -> None:
    from . import kernels

    kernels.run(options.budget, _folder(options), options.workers)


def _prove(options: argparse.Namespace) -> int:
    from . import prove

    return prove.run()


def _model(options: argparse.Namespace) -> None:
    from . import model

    model.run(None if options.tiny else _folder(options), options.tiny, options.budget)


def _memory(options: argparse.Namespace) -> None:
    from . import memory

    memory.run(None if options.quick else options.out, options.budget, options.quick)


def _overhead(options: argparse.Namespace) -> int:
    from . import overhead

    return overhead.main(options.data, options.settings, options.repeats)


def _host(options: argparse.Namespace) -> None:
    from . import host

    host.run(
        options.case or host.KINDS,
        options.rounds,
        options.against,
        options.profile,
        options.out if options.write else None,
    )


def _tune(options: argparse.Namespace) -> None:
    from . import tune

    tune.main(options.budget)


def _gpu(options: argparse.Namespace) -> int:
    """Everything that needs a GPU, in one go; a part that fails leaves the others their time."""
    from . import kernels
    from .device import brief

    started = time.monotonic()
    folder = _folder(options)
    failed = 0
    try:
        spare = max(60.0, options.budget - MODEL_S - MEMORY_S)
        rows = kernels.run(spare, folder, options.workers)
        _plot(rows, folder)
    except Exception as error:  # what was measured before it is written, and the model may work
        kernels.say(f"bench: the kernels' table is cut short: {brief(error)}")
        failed = 1
    # In processes of their own, whatever has become of this one's device.
    for part, kept_back in (("model", MEMORY_S), ("memory", 0.0)):
        left = max(60.0, started + options.budget - kept_back - time.monotonic())
        command = [sys.executable, "-m", "bench", part, "--budget", f"{left:.0f}"]
        try:
            done = subprocess.run([*command, "--out", options.out], check=False, timeout=left + 60)
            failed = failed or done.returncode
        except subprocess.TimeoutExpired:
            kernels.say(f"bench: the table of the {part} is cut short: its time is over")
            failed = 1
    kernels.say(f"done in {time.monotonic() - started:.0f} s: {folder}")
    return failed


def _plot(rows: list[dict[str, object]], folder: Path) -> None:
    from .device import missing

    reason = missing("matplotlib")
    if reason:
        print(f"no plots: {reason}", file=sys.stderr)
        return
    from .plots import draw

    for path in draw(rows, folder):
        print(f"plot: {path}", file=sys.stderr)


def _compile(options: argparse.Namespace) -> int:
    from . import aot

    return aot.main(options.target or tuple(aot.TARGETS), options.dtype or aot.NAMES)


def _parity(options: argparse.Namespace) -> int:
    from . import parity

    return parity.main()


def _proof(options: argparse.Namespace) -> int:
    print("# Every kernel, compiled ahead of time\n", flush=True)
    compiled = _compile(options)
    print("\n# What each schedule must cost\n", flush=True)
    roofline.main()
    print("# Every schedule in the interpreter, against float64\n", flush=True)
    interpreted = _parity(options)
    return compiled or interpreted


def _folder(options: argparse.Namespace) -> Path:
    """Where this device's results go.

    Raises:
        Unavailable: there is no CUDA device.
    """
    from .device import cuda_device

    device = cuda_device()
    from fedalt_kernels.triton.tiles import device_name

    return options.out / device_name(device)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where to look."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bench: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m bench", description="What the kernels cost: modelled, compiled, measured."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    floors = commands.add_parser("roofline", help="print what each schedule must cost; no GPU")
    floors.add_argument("--all", action="store_true", help="every case, not only the goals'")
    floors.add_argument("--bandwidth", type=_positive, default=4.3, help="TB/s, default 4.3")
    floors.add_argument("--matrix", type=_positive, default=790.0, help="TFLOP/s, default 790")
    floors.set_defaults(command=_roofline)

    ahead = commands.add_parser("compile", help="compile every kernel for every target; no GPU")
    _add_targets(ahead)
    ahead.set_defaults(command=_compile)

    parity = commands.add_parser("parity", help="run every schedule in the interpreter; no GPU")
    parity.set_defaults(command=_parity)

    proof = commands.add_parser("proof", help="compile, roofline and parity in one go; no GPU")
    _add_targets(proof)
    proof.set_defaults(command=_proof)

    kernels = commands.add_parser("kernels", help="check and time the layer and its peers")
    _add_time(kernels, 300.0)
    _add_place(kernels)
    _add_workers(kernels)
    kernels.set_defaults(command=_kernels)

    model = commands.add_parser("model", help="train and decode with a whole model")
    model.add_argument("--tiny", action="store_true", help="a smoke test on the CPU; no GPU")
    _add_time(model, 600.0)
    _add_place(model)
    model.set_defaults(command=_model)

    memory = commands.add_parser("memory", help="a step's peak and time beside PEFT; no GPU needed")
    memory.add_argument("--quick", action="store_true", help="see that it works; writes nothing")
    _add_time(memory, 280.0)
    _add_place(memory)
    memory.set_defaults(command=_memory)

    overhead = commands.add_parser("overhead", help="a round beside its clients' own work; no GPU")
    overhead.add_argument("--data", default="", help="as of fedalt run; default: the sample")
    overhead.add_argument("--repeats", type=_count, default=5, help="rounds, default 5")
    overhead.add_argument("-c", dest="settings", action="append", default=[], help="a setting")
    overhead.set_defaults(command=_overhead)

    host = commands.add_parser("host", help="the host's time of a layer's call; no GPU needed")
    kinds = ("layer", "group", "decode", "cpu")
    host.add_argument("--case", action="append", choices=kinds, help="default all")
    host.add_argument("--rounds", type=_count, default=20, help="default 20")
    host.add_argument("--against", default="", metavar="REV", help="a commit to measure beside it")
    host.add_argument("--profile", action="store_true", help="print a call's time by function")
    host.add_argument("--write", action="store_true", help="keep the table")
    _add_place(host)
    host.set_defaults(command=_host)

    tune = commands.add_parser("tune", help="search for faster tiles, and keep them for this GPU")
    _add_time(tune, 600.0)
    tune.set_defaults(command=_tune)

    prove = commands.add_parser("prove", help="tests Hopper's kernels here, and records it")
    prove.set_defaults(command=_prove)
    gpu = commands.add_parser("gpu", help="kernels, plots, model and memory within ten minutes")
    _add_time(gpu, WHOLE_S)
    _add_place(gpu)
    _add_workers(gpu)
    gpu.set_defaults(command=_gpu)
    return parser


def _add_time(command: argparse.ArgumentParser, default: float) -> None:
    command.add_argument(
        "--budget",
        type=_positive,
        default=default,
        metavar="SECONDS",
        help=f"stop measuring after this long, default {default:.0f}",
    )


def _add_place(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="takes a folder named after the device, default bench/results",
    )


def _add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers",
        type=_count,
        default=8,
        metavar="COUNT",
        help="processes that compile and check, default 8",
    )


def _add_targets(parser: argparse.ArgumentParser) -> None:
    targets, dtypes = ("sm_80", "sm_90", "sm_100", "gfx942"), ("bf16", "fp16", "fp32")
    parser.add_argument("--target", action="append", choices=targets, help="default all")
    parser.add_argument("--dtype", action="append", choices=dtypes, help="default all")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"wants a positive number, got {text!r}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wants a whole number from 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
