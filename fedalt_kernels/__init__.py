"""A frozen linear layer with several gated LoRA adapters, computed as one operation."""

from .api import Adapter, mixed_lora_linear
from .layer import MixedLoRALinear

__all__ = ["Adapter", "MixedLoRALinear", "mixed_lora_linear"]
__version__ = "0.1.0"
