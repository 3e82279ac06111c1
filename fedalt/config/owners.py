"""Who sets what where a federation spans sites: it is the federation's, unless named here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedalt.config.schema import Config
from fedalt.config.settings import config_from_dict
from fedalt.errors import InputError

SITES_OWN = (
    "out",
    "threads",
    "save_total_limit",
    "model.path",
    "model.device",
    "model.quantization",
    "lora.impl",
    "lora.client_starts",
    "data.path",
    "data.sources",
    "data.splits",
    "data.columns",
    "data.format",
    "data.clients",
    "data.test_share",
    "train.micro_batch",
    "train.gradient_checkpointing",
    "train.offload_activations",
    "train.loss_chunk",
    "evaluate.batch_size",
    "evaluate.answers",
)
"""What a site keeps to itself: where its data and its base are, and what its machine can do."""


def federation_part(config: Config) -> dict[str, Any]:
    """By dotted key, what every site must have alike: all that travels of a config."""
    return {key: value for key, value in config.flat().items() if key not in SITES_OWN}


def site_part(config: Config) -> dict[str, Any]:
    """By dotted key, what stays at the site."""
    return {key: value for key, value in config.flat().items() if key in SITES_OWN}


def site_config(federation: Mapping[str, Any], site: Mapping[str, Any]) -> Config:
    """A site's config: the federation's settings, and its own, by dotted key.

    Raises:
        InputError: a key is the other's to set, or not known, or its value is not.
    """
    for key in site:
        if key not in SITES_OWN:
            raise InputError(f"{key} is not a site's to set; leave it out, or set it at the server")
    for key in federation:
        if key in SITES_OWN:
            raise InputError(f"{key} is a site's to set, and came from the server; ask who runs it")
    settings: dict[str, Any] = {}
    for key, value in {**federation, **site}.items():
        group, _, name = key.rpartition(".")
        (settings.setdefault(group, {}) if group else settings)[name] = value
    return config_from_dict(settings)
