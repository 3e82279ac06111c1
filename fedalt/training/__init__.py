"""One client's round: its loss, its steps, as much of a batch at a time as fits."""

from fedalt.training.activations import check_recomputes
from fedalt.training.client import TrainResult, count_steps, train_client
from fedalt.training.loss import answer_loss, class_loss, token_losses
from fedalt.training.micro import free_memory, out_of_memory
from fedalt.training.optimizers import check_optimizer
from fedalt.training.packing import check_packing
from fedalt.training.private import check_privacy, epsilon_after, sampling_rate
from fedalt.training.together import NotTogether, Trainee, train_together
from fedalt.training.unused import UnusedLayers

__all__ = [
    "NotTogether",
    "TrainResult",
    "Trainee",
    "UnusedLayers",
    "answer_loss",
    "check_optimizer",
    "check_packing",
    "check_privacy",
    "check_recomputes",
    "class_loss",
    "count_steps",
    "epsilon_after",
    "free_memory",
    "out_of_memory",
    "sampling_rate",
    "token_losses",
    "train_client",
    "train_together",
]
