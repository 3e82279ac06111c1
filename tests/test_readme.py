"""What the README and the examples say can be run, runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedalt.config.schema import ModelConfig
from fedalt.model.base import load_base

ROOT = Path(__file__).parent.parent


def test_the_readme_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert len(blocks) == 4
    layer: dict = {}
    exec(blocks[0], layer)
    assert layer["y"].shape == (4, 512, 1024)
    model, _ = load_base(ModelConfig())
    names = {"model": model, "clients_models": [model, model]}
    exec(blocks[1], names)
    assert len(names["rows"]) == 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = {"x": (70, 32), "weight": (24, 32), "bias": (24,), "mixer": (2, 32)}
    shapes |= {"a0": (4, 32), "b0": (24, 4), "a1": (4, 32), "b1": (24, 4)}
    tensors = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    exec(blocks[2], tensors)
    assert tensors["y"].shape == (70, 24)
    exec(blocks[3], layer)
    assert layer["w"].shape == (1024, 1024)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_an_example_runs(path):
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
    assert done.stdout
