"""The tests for another Python than the default one; ``make test-newest`` runs them.

With PyTorch: settings, data, reports, the kernels' contract, the command and whole tiny runs.
Without, what imports none, and the wheel. PyPI's builds of PyTorch for Linux take gigabytes, so CI
has it for one Python alone; ``.venv-newest/bin/pip install -r requirements.txt`` adds it here.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITH_TORCH = "config data report test_cli.py test_wheel.py kernels/test_contract.py run/test_run.py"
WITHOUT = (
    "config/test_config.py config/test_listing.py data/test_partition.py data/test_suites.py "
    "report/test_page.py report/test_report.py test_wheel.py"
)


def main() -> int:
    sys.path.insert(0, str(ROOT))
    tests, options = WITH_TORCH, ["-q"]
    if not importlib.util.find_spec("torch"):
        tests, options = WITHOUT, ["-q", "--noconftest", "-k", "not tensorboard and not runs"]
        for door in ("fedalt", "fedalt.data"):  # these import PyTorch, the rooms' files need not
            module = types.ModuleType(door)
            module.__path__ = [str(ROOT / door.replace(".", "/"))]
            sys.modules[door] = module
    print(f"Python {sys.version.split()[0]}, {tests}", flush=True)
    return pytest.main([*options, *(str(ROOT / "tests" / name) for name in tests.split())])


if __name__ == "__main__":
    sys.exit(main())
