"""What a run is: frozen dataclasses of settings, from YAML or in code."""

from fedalt.config.data import CHAT, DIGITS, SAMPLE, DataConfig, PartitionConfig
from fedalt.config.listing import list_settings
from fedalt.config.schema import (
    BUILTIN_BASE,
    BUILTIN_VIT,
    Config,
    EvaluateConfig,
    ModelConfig,
    TrainConfig,
)
from fedalt.config.settings import load_config

__all__ = [
    "BUILTIN_BASE",
    "BUILTIN_VIT",
    "CHAT",
    "DIGITS",
    "SAMPLE",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "ModelConfig",
    "PartitionConfig",
    "TrainConfig",
    "list_settings",
    "load_config",
]
