"""What a run is: frozen dataclasses of settings, from YAML or in code."""

from fedalt.config.data import CHAT, DIGITS, SAMPLE, DataConfig, PartitionConfig
from fedalt.config.listing import list_settings
from fedalt.config.owners import federation_part, load_site, site_config, site_part
from fedalt.config.schema import (
    BUILTIN_BASE,
    BUILTIN_VIT,
    Config,
    EvaluateConfig,
    ModelConfig,
    PrivacyConfig,
    TrainConfig,
)
from fedalt.config.settings import load_config
from fedalt.config.train import AUTO

__all__ = [
    "AUTO",
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
    "PrivacyConfig",
    "TrainConfig",
    "federation_part",
    "list_settings",
    "load_config",
    "load_site",
    "site_config",
    "site_part",
]
