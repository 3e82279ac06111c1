"""Who sets what where a federation spans sites: it is the federation's, unless named here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fedalt.config.schema import Config
from fedalt.config.settings import config_from_dict
from fedalt.errors import InputError

SITES_OWN = (
    "out",
    "threads",
    "save_total_limit",
    "report_to",
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
    "train.together",
    "train.gradient_checkpointing",
    "train.offload_activations",
    "train.loss_chunk",
    "evaluate.batch_size",
    "evaluate.together",
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


def load_site(path: str) -> dict[str, Any]:
    """A site's own settings by dotted key, from its YAML.

    Raises:
        InputError: the file is missing or no YAML mapping, or a key is not a site's to set.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        where = path or "node config, site"
        raise InputError(f"{where}: cannot read the site's settings: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError):
        raise InputError(f"{path}: broken YAML") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: wants a mapping of settings, got {type(settings).__name__}")
    groups = {key.partition(".")[0] for key in SITES_OWN if "." in key}
    own: dict[str, Any] = {}
    for key, value in settings.items():
        if key in groups and isinstance(value, dict):
            own |= {f"{key}.{inner}": item for inner, item in value.items()}
        else:
            own[str(key)] = value
    try:
        site_config({}, own)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return own
