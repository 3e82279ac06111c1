"""Kill a run with SIGKILL at random moments, resume it each time, and compare every byte.

``python -m bench.kill_resume [CONFIG.yaml] --kills 8 --out DIR [--data DIR] [-c key.path=value ...]
[--bad CLIENT=nan|inf|huge|name|shape|dtype ...]`` makes one uncut run and one killed run of the
same config; clients named by ``--bad`` spoil all that they hand in. It prints where each kill
struck and what was refused, and ends with status 1 if adapters, mixers, metrics or results differ
in one byte, or if a kill came too late to strike.
"""

from __future__ import annotations

import argparse
import collections
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedalt import cli
from fedalt.config.settings import load_config
from fedalt.report.events import read_events, read_times
from fedalt.run import turns
from fedalt.store.checkpoint import DRAFT, list_checkpoints
from fedalt.store.journal import METRICS, TIMES
from fedalt.store.rundir import CONFIG, RESULTS

Update = dict[str, Tensor]
SPOIL: dict[str, Callable[[Update], Update]] = {
    "nan": lambda update: {n: t.clone().fill_(torch.nan) for n, t in update.items()},
    "inf": lambda update: {n: t / 0.0 for n, t in update.items()},
    "huge": lambda update: {n: 1000 * (t + 1) for n, t in update.items()},
    "name": lambda update: {f"{n}.x": t for n, t in update.items()},
    "shape": lambda update: {n: t[:1] for n, t in update.items()},
    "dtype": lambda update: {n: t.double() for n, t in update.items()},
}
"""What a bad client makes of its update."""
CHILD = "import sys; from bench import kill_resume as k; sys.exit(k.child(sys.argv[1:]))"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", help="default: the sample")
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, required=True, help="takes uncut/ and killed/")
    parser.add_argument("--data", default="")
    parser.add_argument("--bad", action="append", default=[], metavar="CLIENT=HOW")
    parser.add_argument("-c", dest="settings", action="append", default=[])
    options = parser.parse_args(arguments)

    command = [sys.executable, "-c", CHILD, ",".join(options.bad), "run"]
    command += [options.config] if options.config else []
    command += ["--data", options.data] if options.data else []
    command += [word for setting in options.settings for word in ("-c", setting)]
    uncut, killed = options.out / "uncut", options.out / "killed"
    if options.out.is_dir() and any(options.out.iterdir()):
        parser.error(f"--out {options.out}: not empty; name another")
    started = time.monotonic()
    _finish(command, uncut)
    print(f"uncut: {time.monotonic() - started:.0f} s", flush=True)

    seconds = collections.Counter[int]()
    for row in read_times(uncut / TIMES):
        seconds[row["round"]] += row["seconds"]
    last = load_config(uncut / CONFIG).rounds
    draw = random.Random(options.seed)
    kills = 0
    for moment in sorted(draw.uniform(0, last + 1) for _ in range(options.kills)):
        number = int(moment)  # the round in which it shall strike
        wait = (moment - number) * seconds[number]
        if not _kill(command, killed, number, wait):
            break
        kills += 1
        found = [path.name for path in list_checkpoints(killed)]
        drafts = [path for path in killed.glob(f"checkpoints/{DRAFT}*/*/*") if path.is_file()]
        where = f"{wait:.2f} s into round {number}"
        left = f"newest is {found[-1] if found else 'none'}, {len(drafts)} files of a draft left"
        print(f"kill {kills}, {where}: {left}", flush=True)
    _finish(command, killed)

    events = collections.Counter(event["event"] for event in read_events(uncut / METRICS))
    print(f"refused {events['refuse']}, failed {events['fail']}, late {events['late']}")
    left, right = _record(uncut), _record(killed)
    differing = [name for name in left.keys() | right.keys() if left.get(name) != right.get(name)]
    print(f"{kills} kills, {len(left)} files, {len(differing)} differ {sorted(differing)}")
    return int(bool(differing) or kills < options.kills)


def child(arguments: Sequence[str]) -> int:
    """``fedalt`` with the bad clients of the first argument, ``CLIENT=HOW`` by comma."""
    bad = dict(pair.split("=") for pair in arguments[0].split(",") if pair)
    honest = turns.hand_in

    def hand_in(state: Update, parts: tuple[str, ...], client: str) -> Update:
        update = honest(state, parts, client)
        return SPOIL[bad[client]](update) if client in bad else update

    turns.hand_in = hand_in
    return cli.main(arguments[1:])


def _into(command: Sequence[str], run: Path) -> list[str]:
    resume = ["--resume"] if (run / CONFIG).exists() else []
    return [*command, "--out", str(run), *resume]


def _finish(command: Sequence[str], run: Path) -> None:
    subprocess.run(_into(command, run), check=True, stdout=subprocess.DEVNULL)


def _kill(command: Sequence[str], run: Path, number: int, wait: float) -> bool:
    """Start it and kill it ``wait`` seconds into a round; False where it had ended before."""
    begins = run / (f"checkpoints/round-{number - 1:04d}" if number else CONFIG)
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(_into(command, run), stdout=quiet, stderr=quiet)
    while process.poll() is None and not begins.exists():
        time.sleep(0.002)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def _record(run: Path) -> dict[str, bytes]:
    last = list_checkpoints(run)[-1]
    files = [*last.rglob("*.*"), run / METRICS, run / RESULTS, *run.glob("joined/*")]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


if __name__ == "__main__":
    raise SystemExit(main())
