"""A client in a folder of its own, and in the checkpoints of a Hugging Face `Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fedalt.errors import InputError
from fedalt.model import adapter_state, client_tensors, load_adapter_state
from fedalt.store.checkpoint import StoredState, write_state, writing

CLIENT = "model.safetensors"
"""The name by which a `Trainer` finds in its checkpoint a model, or a part of one."""


def save_client(model: nn.Module, folder: str | Path) -> Path:
    """Write all that makes a client, ``FOLDER/model.safetensors``: its adapters, mixers and trained
    heads, in float32, and nothing of the base.

    Raises:
        InputError: the model has no adapters, or the folder cannot be written.
    """
    state = adapter_state(model)
    if not state:
        raise InputError("save_client: the model has no adapters; inject them first")
    path = Path(folder) / CLIENT
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_state(path, state)
    return path


def load_client_state(model: nn.Module, folder: str | Path) -> None:
    """Copy a client that ``save_client`` wrote, or a `Trainer` with ``client_checkpoints``, into a
    model with adapters of the same rank in the same layers.

    Raises:
        InputError: no readable client is there, or it does not fit the model.
    """
    path = Path(folder) / CLIENT
    try:
        load_adapter_state(model, StoredState(path).read())
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def client_checkpoints() -> Any:
    """A callback for `transformers.Trainer` and what is made of it, such as TRL's ``SFTTrainer``.

    Given as ``callbacks=[fedalt.client_checkpoints()]``, it has every checkpoint of the trainer
    hold the client alone, as ``save_client`` writes it, in place of the whole model. A training
    taken up from one by ``resume_from_checkpoint`` ends as one that was never cut short. Not for a
    model in shards (FSDP, DeepSpeed's third stage).
    """
    from transformers import TrainerCallback  # here, since it takes six seconds to import

    class ClientCheckpoints(TrainerCallback):
        def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            model = given["model"]
            own = {name for name, _ in client_tensors(model)}
            # What a checkpoint does not hold and a trainer need not warn of.
            model._keys_to_ignore_on_save = model.state_dict().keys() - own

            def save(folder: str, *, is_main_process: bool = True, **_: Any) -> None:
                if is_main_process:
                    save_client(model, folder)

            model.save_pretrained = save

    return ClientCheckpoints()
