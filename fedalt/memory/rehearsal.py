"""A run's training step and evaluation, gone through without weights to see what memory they take.

It is the run's own code that is followed, ``client.train_client`` and the task's ``evaluate``, on
batches as large as any the run can meet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from fedalt.config import AUTO, Config, EvaluateConfig, TrainConfig
from fedalt.errors import InputError
from fedalt.evaluation import Examined, ImageTask, Task, TextTask
from fedalt.memory.assumed import assume, read_at_hand
from fedalt.memory.skeleton import give_storage, load_skeleton
from fedalt.memory.tracker import Kind, Tracker
from fedalt.methods import get_method
from fedalt.model import (
    adapter_state,
    client_tensors,
    mark_chunkable,
    mixed_layers,
    output_head,
    usable_device,
)
from fedalt.run import check_base, most_together, put_adapters
from fedalt.training import Trainee, check_recomputes, train_client, train_together

UNFOLLOWABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
SMALLEST_8BIT, BLOCK_8BIT = 4096, 256
BLOCK_NF4, NESTED_BLOCK_NF4 = 64, 256
TABLES_NF4 = 4 * (16 + 256 + 1)
"""Of codes, and the mean scale."""

Bytes = Counter[Kind]


class Rehearsal:
    """The model of a run in shapes alone, and the bytes that it takes in any settings of training,
    evaluation and quantization."""

    def __init__(self, config: Config) -> None:
        """Read the model's configuration and the data, if they are at hand.

        Raises:
            InputError: bad data, method, model, device or target.
        """
        check_base(config)
        lora = config.lora
        if lora.impl == "reference":
            raise InputError("lora.impl: the memory of 'reference' is not told; leave it out")
        self._config, self.device = config, usable_device(config.model.device)
        self._method = get_method(config.method)
        parts = read_at_hand(config)
        images = config.data.kind == "image"
        self._clients = len(parts)  # 0: not known
        records = [record for part in parts for record in (*part.train, *part.test)]
        classes = sorted({record.label for record in records}) if images else []
        self._model, self._tool = load_skeleton(config, classes)
        self.head = output_head(self._model)
        self.recomputes = bool(getattr(self._model, "supports_gradient_checkpointing", False))
        self.assumed = assume(config, parts, self._task(config).encode)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._ran: dict[TrainConfig | EvaluateConfig, Bytes] = {}
        # Products in PyTorch keep the same tensors as fused ones; masks are made of numbers.
        rank = max([lora.rank, *lora.client_ranks.values()])
        plain = replace(config, lora=replace(lora, rank=rank, impl="torch", dropout=0.0))
        with self._fake:
            give_storage(self._model, self.device)
            put_adapters(self._model, plain)
        self._own = {id(t): Kind.ADAPTERS for _, t in client_tensors(self._model)}
        # A method that adds to the base keeps its first weights on the host.
        kept = self._method.changes_base and self.device.type == "cpu"
        weights = [layer.base.get_parameter("weight") for _, layer in mixed_layers(self._model)]
        self._first_weights = sum(weight.nbytes for weight in weights) if kept else 0
        if not images:
            with self._followed():
                mark_chunkable(self._model)

    def training(self, train: TrainConfig, quantization: str) -> Bytes:
        """The most bytes, by kind, that a step holds beside the moments of those before it.

        Raises:
            InputError: the model has no checkpointing and it is asked for, or cannot be followed.
        """
        followed = replace(train, optimizer="adamw", max_steps=len(self._method.trains))
        if followed not in self._ran:
            if train.gradient_checkpointing:
                check_recomputes(self._model)
            count = min(train.batch_size, self.assumed.train)
            if train.micro_batch is not None:  # the third part meets what the second did
                count = min(count, 2 * train.micro_batch)
            examples = [self.assumed.train_example] * count
            task = self._task(replace(self._config, train=train))
            clients = self.together(train)
            with self._followed() as tracker:
                if clients > 1:
                    self._train_together(clients, examples, followed, task)
                else:
                    train_client(
                        self._model,
                        examples,
                        followed,
                        task.loss,
                        trains=self._method.trains,
                        seed=0,
                        count=task.count,
                    )
            self._ran[followed] = tracker.peak
            self._ran[followed][Kind.OPTIMIZER] = tracker.moments
        peak = self._quantized(self._ran[followed], quantization)
        if train.optimizer != "adamw":
            moments = self._moments_8bit(paged=train.optimizer.startswith("paged"))
            peak[Kind.OPTIMIZER] = self.together(train) * moments
        return peak

    def together(self, train: TrainConfig) -> int:
        """The clients that train in one pass, at most."""
        if replace(self._config, train=train).trains_alone:
            return 1
        tokens = train.batch_size * self._task(self._config).length(self.assumed.train_example)
        most = most_together(train.together, tokens, self.device.type)
        return min(most, self._clients or most)

    def _train_together(
        self, clients: int, examples: list[Any], train: TrainConfig, task: Task
    ) -> None:
        state = adapter_state(self._model)
        train_together(
            self._model,
            [Trainee(state, examples, 0) for _ in range(clients)],
            train,
            task.losses,
            trains=self._method.trains,
            length=task.length,
            count=task.count,
        )

    def evaluation(self, evaluate: EvaluateConfig, quantization: str) -> Bytes:
        """The most bytes, by kind, that the evaluation of a batch holds.

        A forward for the loss and the first of generation are followed; the cache that generation
        ends with is counted from the prompts'.
        """
        if evaluate not in self._ran:
            size, together = evaluate.batch_size, evaluate.together
            count = size if together == AUTO else min(size, int(together) * self.assumed.test)
            tested = Examined(
                [self.assumed.test_example] * count, [self.assumed.test_record] * count
            )
            task = self._task(replace(self._config, evaluate=evaluate))
            with self._followed(forwards=2) as tracker:
                task.evaluate(self._model, [tested])
            self._ran[evaluate] = max(
                tracker.peak, self._last_token(tracker, evaluate), key=Counter.total
            )
        return self._quantized(self._ran[evaluate], quantization)

    def _last_token(self, tracker: Tracker, evaluate: EvaluateConfig) -> Bytes:
        """The bytes while the last token of an answer is made; none of it without a cache.

        Its logits are there once more in float32, as generation takes them.
        """
        cache = tracker.cache
        if not cache:
            return Counter()
        prompt = len(self.assumed.test_example.prompt)
        grown = (prompt + evaluate.max_new_tokens) / prompt
        weights: Bytes = Counter()
        for kind in (Kind.BASE, Kind.ADAPTERS):
            weights[kind] = sum(tracker.held(kind))
        if self.head is not None:
            rows = min(evaluate.batch_size, self.assumed.test) * evaluate.num_beams
            weight = self.head.get_parameter("weight")  # [vocabulary, width]
            weights[Kind.LOGITS] = rows * weight.shape[0] * (4 + weight.itemsize)
        weights[Kind.CACHE] = int(grown * sum(cache))
        weights[Kind.TEMPORARY] = int(grown * max(cache))  # a layer's, old and new
        return weights

    @contextmanager
    def _followed(self, forwards: int | None = None) -> Iterator[Tracker]:
        try:
            with self._fake:
                tracker = Tracker(self._model, self.head, self.device, self._own)
                with tracker.following(forwards):
                    yield tracker
        except UNFOLLOWABLE as error:
            path = self._config.model.path
            raise InputError(
                f"model.path: the memory of {path!r} depends on its data ({error}); run it to see"
            ) from None

    def _task(self, config: Config) -> Task:
        if config.data.kind == "image":
            return ImageTask(config, self._tool, {})
        return TextTask(config, self._tool)

    def _quantized(self, peak: Bytes, quantization: str) -> Bytes:
        """The same with the linear layers' weights packed, and room for the largest unpacked."""
        peak = Counter(peak)
        peak[Kind.BASE] += self._first_weights
        if quantization != "none":
            weights = self._linear_weights(quantization)
            own = [weight.numel() * weight.element_size() for weight in weights]
            packed = [_packed_bytes(weight, quantization) for weight in weights]
            peak[Kind.BASE] += sum(packed) - sum(own)
            peak[Kind.TEMPORARY] += max(own, default=0)
        return peak

    def _linear_weights(self, quantization: str) -> list[torch.Tensor]:
        names = ("Linear",) if quantization == "fp8" else ("Linear", "Conv1D")
        linear = (m for m in self._model.modules() if type(m).__name__ in names)
        weights = [m.get_parameter("weight") for m in linear if m is not self.head]
        return [weight for weight in weights if id(weight) not in self._own]

    def _moments_8bit(self, paged: bool) -> int:
        """Two bytes a trained number and a scale a block; small tensors keep 32 bits."""
        total = 0
        for _, tensor in client_tensors(self._model):
            count = tensor.numel()
            if tensor.requires_grad and not (paged and count >= 100_000):
                small = count < SMALLEST_8BIT
                total += 8 * count if small else 2 * (count + 4 * -(-count // BLOCK_8BIT))
        return total


def _packed_bytes(weight: torch.Tensor, quantization: str) -> int:
    count, rows = weight.numel(), weight.shape[0]
    if quantization == "nf4":
        blocks = -(-count // BLOCK_NF4)
        scales = blocks + 4 * -(-blocks // NESTED_BLOCK_NF4)
        return -(-count // 2) + scales + TABLES_NF4
    return count + 4 * rows
