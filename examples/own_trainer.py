"""Federated rounds in which each client's training is a `Trainer` of your own.

``python examples/own_trainer.py``; wants ``fedalt[trainer]``.
"""

from tempfile import TemporaryDirectory

from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import fedalt
from fedalt.config import ModelConfig
from fedalt.model import load_base

TEXTS = {"ann": "Mia sold three red lamps.", "bob": "We met at the old harbour on Monday."}
model, tokenizer = load_base(ModelConfig(path="builtin"))
fedalt.inject(model, rank=8, alpha=16, target_modules=("q_proj", "v_proj"))

with TemporaryDirectory() as folder:
    for client in TEXTS:
        fedalt.save_client(model, f"{folder}/{client}")
    for number in (1, 2):
        sent = {}
        for client, text in TEXTS.items():
            fedalt.load_client_state(model, f"{folder}/{client}")
            given = {"max_steps": 5, "learning_rate": 4e-3, "report_to": "none", "use_cpu": True}
            arguments = TrainingArguments(f"{folder}/{client}-{number}", **given, disable_tqdm=True)
            collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
            data = [tokenizer(text)] * 40
            callbacks = [fedalt.client_checkpoints()]
            trainer = Trainer(model, arguments, collator, data, callbacks=callbacks)
            print(f"round {number}  {client}  loss {trainer.train().training_loss:.3f}")
            fedalt.save_client(model, f"{folder}/{client}")
            sent[client] = fedalt.individual_state(model)
        rows = fedalt.rest_of_world(list(sent.values()))
        for client, row in zip(sent, rows, strict=True):
            fedalt.load_client_state(model, f"{folder}/{client}")
            fedalt.load_rest_of_world(model, row)
            fedalt.save_client(model, f"{folder}/{client}")
