"""FedALT: personalised federated fine-tuning with individual and Rest-of-World LoRAs."""

from fedalt.config import Config
from fedalt.errors import InputError
from fedalt.models import inject
from fedalt.run import Federation, load_client
from fedalt.server import rest_of_world
from fedalt.settings import load_config
from fedalt.states import individual_state, load_rest_of_world

__all__ = [
    "Config",
    "Federation",
    "InputError",
    "individual_state",
    "inject",
    "load_client",
    "load_config",
    "load_rest_of_world",
    "rest_of_world",
]
__version__ = "0.1.0"
