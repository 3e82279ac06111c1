"""What importing the package needs, and what it exports."""

import subprocess
import sys

import fedalt_kernels

PROGRAM = """
import os, sys
sys.modules["triton"] = None
reads = []
class Watched(type(os.environ)):
    def __getitem__(self, key):
        reads.append(key)
        return super().__getitem__(key)
import torch, numpy
os.environ.__class__ = Watched
import fedalt_kernels
os.environ.__class__ = Watched.__bases__[0]
assert not reads, reads
assert not torch.cuda.is_initialized()
assert "transformers" not in sys.modules
layer = fedalt_kernels.MixedLoRALinear(torch.nn.Linear(8, 4), rank=2)
layer(torch.randn(3, 8)).sum().backward()
assert layer.individual.b.grad is not None
"""


def test_works_without_triton_and_reads_no_environment() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    assert fedalt_kernels.__all__ == [
        "Adapter",
        "Fp8Linear",
        "GroupedMixedLoRALinear",
        "MixedLoRALinear",
        "QuantizedWeight",
        "Segments",
        "__version__",
        "apply_stacked",
        "mixed_lora_linear",
        "mixed_lora_linear_grouped",
        "unused_layers",
    ]
    assert fedalt_kernels.__version__ == "0.1.0"


def test_works_without_bitsandbytes() -> None:
    program = (
        "import sys; sys.modules['bitsandbytes'] = None; import torch, fedalt_kernels as f; "
        "f.MixedLoRALinear(f.Fp8Linear.from_linear(torch.nn.Linear(8, 4)))(torch.randn(2, 8))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
