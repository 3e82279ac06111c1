"""Put mixed LoRAs into a Hugging Face model and train them on one sentence.

``python examples/drop_in.py`` takes the built-in base; any causal language model's id or folder may
stand in its place.
"""

import torch

import fedalt
from fedalt.config.schema import ModelConfig
from fedalt.model.base import load_base

model, tokenizer = load_base(ModelConfig(path="builtin"))
model = fedalt.inject(model, rank=8, alpha=16, dropout=0.05, target_modules=("q_proj", "v_proj"))

trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
print(f"{sum(p.numel() for p in trained):,} of {model.num_parameters():,} parameters are trained")

batch = tokenizer("Mia sold three red lamps at the market on Monday.", return_tensors="pt")
optimizer = torch.optim.AdamW(trained, lr=4e-3)
model.train()
for step in range(20):
    loss = model(input_ids=batch.input_ids, labels=batch.input_ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        print(f"step {step:2d}  loss {loss.item():.3f}")

update = fedalt.individual_state(model)
size = sum(tensor.numel() * tensor.element_size() for tensor in update.values())
print(f"what would leave this client: {len(update)} tensors, {size / 1024:.0f} KiB")
