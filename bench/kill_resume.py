"""Kill a run with SIGKILL at random moments, resume it each time, and compare every byte.

``python -m bench.kill_resume --kills 8 --out DIR [--data DIR] [-c key.path=value ...]`` makes one
uncut run and one killed run of the same config. It prints where each kill struck, and ends with
status 1 if adapters, mixers, metrics or results differ in one byte.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from fedalt.checkpoint import list_checkpoints
from fedalt.rundir import METRICS, RESULTS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, required=True, help="takes uncut/ and killed/")
    parser.add_argument("--data", default="")
    parser.add_argument("-c", dest="settings", action="append", default=[])
    options = parser.parse_args()

    command = [sys.executable, "-m", "fedalt", "run", "--resume"]
    command += ["--data", options.data] if options.data else []
    command += [word for setting in options.settings for word in ("-c", setting)]
    uncut, killed = options.out / "uncut", options.out / "killed"
    started = time.monotonic()
    subprocess.run([*command, "--out", uncut], check=True, stdout=subprocess.DEVNULL)
    whole = time.monotonic() - started
    print(f"uncut: {whole:.0f} s", flush=True)

    moments = random.Random(options.seed)
    kills = 0
    while kills < options.kills:
        wait = moments.uniform(0, whole)
        process = subprocess.Popen(
            [*command, "--out", killed], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=wait)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        kills += 1
        found = [path.name for path in list_checkpoints(killed)]
        print(f"kill {kills} after {wait:.1f} s, at {found[-1] if found else 'none'}", flush=True)
    subprocess.run([*command, "--out", killed], check=True, stdout=subprocess.DEVNULL)

    left, right = _record(uncut), _record(killed)
    differing = [name for name in left.keys() | right.keys() if left.get(name) != right.get(name)]
    print(f"{kills} kills, {len(left)} files, {len(differing)} differ {sorted(differing)}")
    return 1 if differing else 0


def _record(run: Path) -> dict[str, bytes]:
    last = list_checkpoints(run)[-1]
    files = [*last.rglob("*.*"), run / METRICS, run / RESULTS]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


if __name__ == "__main__":
    raise SystemExit(main())
