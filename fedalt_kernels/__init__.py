"""A frozen linear layer with several gated LoRA adapters, computed as one operation."""

from .api import Adapter, mixed_lora_linear
from .fp8 import Fp8Linear
from .layer import MixedLoRALinear, unused_layers
from .quantized import QuantizedWeight

__all__ = [
    "Adapter",
    "Fp8Linear",
    "MixedLoRALinear",
    "QuantizedWeight",
    "__version__",
    "mixed_lora_linear",
    "unused_layers",
]
__version__ = "0.1.0"  # the only place; setup.py and fedalt read it
