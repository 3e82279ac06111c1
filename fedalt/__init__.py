"""FedALT: personalised federated fine-tuning with individual and Rest-of-World LoRAs."""

import sys

from fedalt.config import Config, load_config
from fedalt.errors import InputError, InputWarning
from fedalt.methods import rest_of_world
from fedalt.model import individual_state, inject, load_rest_of_world
from fedalt.run import Federation
from fedalt.serving import load_client, load_clients, load_export
from fedalt.store import client_checkpoints, load_client_state, save_client
from fedalt_kernels import __version__

__all__ = [
    "Config",
    "Federation",
    "InputError",
    "InputWarning",
    "__version__",
    "client_checkpoints",
    "individual_state",
    "inject",
    "load_client",
    "load_client_state",
    "load_clients",
    "load_config",
    "load_export",
    "load_rest_of_world",
    "rest_of_world",
    "save_client",
]
# Exported adapters of before the rooms say `from fedalt.export import load_export`.
sys.modules["fedalt.export"] = sys.modules[load_export.__module__]
