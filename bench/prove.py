"""Runs the tests of Hopper's kernels on this GPU, and records that they have passed.

    python -m bench prove

The record, `fedalt_kernels/triton/hopper/proven.json`, lets them serve by default where
architecture, sources and Triton's release are those of the record.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path

import torch
import triton

from fedalt_kernels.triton import tiles
from fedalt_kernels.triton.hopper import record

from .device import Unavailable, cuda_device

ROOT = Path(__file__).parents[1]
TESTS = "tests/kernels/test_hopper.py"


def run() -> int:
    """0 where the tests have passed and the record is written; 1 where one fails."""
    device = cuda_device()
    here = tiles.architecture(device)
    if here != "sm_90":
        raise Unavailable(f"Hopper's kernels are for sm_90, and this GPU is {here}")
    print(record.unproven(device) or "they are proven here already")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS]
    if subprocess.run(command, cwd=ROOT).returncode:
        return 1
    records = json.loads(record.RECORD.read_text("utf-8")) if record.RECORD.exists() else []
    mine = {
        "architecture": here,
        "digest": record.digest(),
        "triton": record.release(),
        "versions": f"Triton {triton.__version__}, PyTorch {torch.__version__}",
        "device": torch.cuda.get_device_name(device),
        "date": datetime.date.today().isoformat(),
    }
    kept = [each for each in records if each["digest"] == mine["digest"] and each != mine]
    text = json.dumps([*kept, mine], indent=2) + "\n"
    record.RECORD.write_text(text, encoding="utf-8")
    print(f"{record.RECORD.name}: {mine}")
    return 0
