"""How a client trains in a round."""

from __future__ import annotations

from dataclasses import dataclass

from fedalt.errors import require, require_count_or_auto, require_one_of

AUTO = "auto"


@dataclass(frozen=True)
class TrainConfig:
    """Local training of one client in one round; optimizer and schedule start afresh each round."""

    batch_size: int = 16
    """Records a step."""
    epochs: int = 5
    """Passes over a client's records in a round, where ``max_steps`` is null."""
    max_steps: int | None = 30
    """Steps a round whatever the number of records; null: ``epochs`` passes over the records."""
    learning_rate: float = 4e-3
    """AdamW's, after the warm-up."""
    weight_decay: float = 0.0
    """AdamW's, of everything that is trained."""
    lr_scheduler: str = "linear"
    """What follows the warm-up: ``linear`` or ``cosine`` decay to zero, or ``constant``."""
    warmup_steps: int = 3
    """Steps of a linear rise to ``learning_rate``, in every round."""
    max_grad_norm: float = 1.0
    """A step's gradient of a larger norm is scaled down to it."""
    optimizer: str = "adamw"
    """``adamw``, or with moments of 8 bits, by bitsandbytes, ``adamw_8bit``; or these in memory
    that a GPU pages out to the host, ``paged_adamw_8bit``. Tensors of fewer than 4096 numbers keep
    moments of 32 bits, and of fewer than 100 000 unpaged ones."""
    micro_batch: int | None = None
    """Examples of a batch that are run at once; null: all. Whenever memory does not suffice it is
    halved, the step is run again, and the run goes on with what fits. A step's gradient stays the
    whole batch's, but for its rounding and, under dropout, its masks."""
    together: int | str = 1
    """Clients that train in one pass over the base where their records are of like lengths. Each
    has its own batches, AdamW, clipping and dropout, and ends where it would alone, but for
    rounding. ``auto``: as many as bring a pass to 512 tokens on a CPU, 8192 elsewhere. Where
    memory does not suffice it is halved."""
    packing: bool = False
    """Short records of a batch share rows, each blind to the others: less padding, the same loss
    and gradient but for rounding and, under dropout, its masks."""
    gradient_checkpointing: bool = False
    """Of every block only the input is kept; the rest is computed again in the backward."""
    offload_activations: bool = False
    """What is kept for the backward waits in host memory; for a GPU."""
    loss_chunk: int | None = None
    """Tokens whose logits are alive at once; null: as many as make 2^24 logits. The loss's peak is
    about 16 bytes x this x the vocabulary."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "train.batch_size", "at least 1", self.batch_size)
        require(self.epochs >= 1, "train.epochs", "at least 1", self.epochs)
        steps_ok = self.max_steps is None or self.max_steps >= 1
        require(steps_ok, "train.max_steps", "at least 1, or null", self.max_steps)
        require(self.learning_rate > 0, "train.learning_rate", "above 0", self.learning_rate)
        require(self.weight_decay >= 0, "train.weight_decay", "at least 0", self.weight_decay)
        require(self.warmup_steps >= 0, "train.warmup_steps", "at least 0", self.warmup_steps)
        require(self.max_grad_norm > 0, "train.max_grad_norm", "above 0", self.max_grad_norm)
        require_one_of(("linear", "cosine", "constant"), "train.lr_scheduler", self.lr_scheduler)
        optimizers = ("adamw", "adamw_8bit", "paged_adamw_8bit")
        require_one_of(optimizers, "train.optimizer", self.optimizer)
        require_count_or_auto("train.together", self.together)
        for name in ("micro_batch", "loss_chunk"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"train.{name}", "at least 1, or null", value)
