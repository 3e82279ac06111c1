"""Every kernel that ships compiles for every target, without a spill and within its limits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A few that a launcher's change could leave out of the table unnoticed.
REMOTE = ("from_blocks", "from_rows", "sum_clients", "expand_rows")
CASES = [
    (target, dtype)
    for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    for dtype in ("bf16", "fp32")
]


# float16 compiles as bfloat16 does, but for the type's name: once here, for all by `make proof`.
@pytest.mark.parametrize(("target", "dtype"), [*CASES, ("sm_90", "fp16")])
def test_ships(target: str, dtype: str) -> None:
    """In a process of its own, since kernels decorated for the interpreter cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "compile", "--target", target, "--dtype", dtype],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    faults = [line for line in done.stdout.splitlines() if not line.endswith("| ok |")]
    assert done.returncode == 0, "\n".join(faults) + done.stderr
    assert done.stdout.count("| ok |") > 20
    assert all(f"| {kernel} |" in done.stdout for kernel in REMOTE)
    print(done.stdout)
