"""A frozen linear layer with several gated LoRA adapters, computed as one operation."""

from .api import Adapter, mixed_lora_linear
from .fp8 import Fp8Linear
from .grouped_api import mixed_lora_linear_grouped
from .grouped_layer import GroupedMixedLoRALinear, apply_stacked
from .layer import MixedLoRALinear, unused_layers
from .quantized import QuantizedWeight
from .segments import Segments

__all__ = [
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
__version__ = "0.1.0"  # the only place; setup.py and fedalt read it
