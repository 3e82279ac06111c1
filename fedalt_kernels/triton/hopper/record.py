"""Where these kernels have passed their tests on a GPU: only there do they serve by default.

`proven.json` beside this file names architecture, Triton version, device, date and the digest of
the kernels' sources; ``python -m bench prove`` writes it where the tests pass.  A changed source is
unproven until they have passed again.
"""

import hashlib
import json
from functools import cache
from pathlib import Path

import torch
import triton

from ..tiles import architecture

FOLDER = Path(__file__).parent
RECORD = FOLDER / "proven.json"
SOURCES = (
    *("backward.py", "blocks.py", "forward.py", "gates.py"),
    *("makers.py", "ring.py", "shapes.py", "sums.py"),
)


def digest() -> str:
    """Of the kernels' sources."""
    found = hashlib.sha256()
    for name in SOURCES:
        found.update((FOLDER / name).read_text(encoding="utf-8").encode())
    return found.hexdigest()[:16]


def release() -> str:
    """Triton's, as far as kernels may depend on it."""
    return ".".join(triton.__version__.split(".")[:2])


@cache
def unproven(device: torch.device) -> str | None:
    """Why the kernels do not serve a device unless they are asked for; None where they do."""
    here = architecture(device)
    if here != "sm_90":
        return f"they are for sm_90, and this is {here}"
    records = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else []
    mine = [record for record in records if record["architecture"] == here]
    if not any(record["digest"] == digest() for record in mine):
        return "this source has not passed its tests on a GPU yet"
    if not any(record["digest"] == digest() and record["triton"] == release() for record in mine):
        return f"they have not passed their tests with Triton {release()}"
    return None
