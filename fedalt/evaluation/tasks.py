"""What the loop does not need to know of text or images: examples, their loss, their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from fedalt.config import Config
from fedalt.data import Example, ImageExample, collate, encode, pack, pixels
from fedalt.errors import InputError
from fedalt.evaluation.evaluate import Examined, evaluate_images, evaluate_texts
from fedalt.model import ClientRows, GateMeter
from fedalt.training import answer_loss, class_loss, token_losses

PATCHES = 14 * 14 + 1
"""The tokens of an image as vision transformers mostly cut it."""


class Task(Protocol):
    """One kind of data, with the tokenizer or image processor of the base."""

    tool: Any
    shares_batches: bool
    """Whether ``evaluate`` takes many clients."""

    def encode(self, records: Sequence[Any], tested: bool = False) -> list[Any]:
        """Records as examples, to train on or to test with."""
        ...

    def count_cut(self, examples: Sequence[Any]) -> int:
        """How many examples are not the whole record."""
        ...

    def loss(self, model: nn.Module, batch: Sequence[Any]) -> Tensor:
        """The mean loss of a batch of examples, in nats (a token)."""
        ...

    def losses(self, model: nn.Module, batch: Sequence[Any]) -> Tensor:
        """Of each example [B], the loss summed over its terms."""
        ...

    def length(self, example: Any) -> int:
        """How many tokens it makes, or nearly so."""
        ...

    def count(self, batch: Sequence[Any]) -> int:
        """How many terms that mean is over."""
        ...

    def evaluate(
        self,
        model: nn.Module,
        clients: Sequence[Examined],
        meter: GateMeter | None = None,
        rows: ClientRows | None = None,
    ) -> list[dict[str, float]]:
        """By client, scores by name, the main one first.

        Args:
            clients: one, or where ``shares_batches`` as many as ``model`` holds.
            meter: watches one pass over the examples.
            rows: to be told whose a batch's rows are; None: one client's.
        """
        ...


class TextTask:
    """Instructions and answers of a causal language model."""

    shares_batches = True

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self.tool, self._config = tokenizer, config

    def encode(self, records: Sequence[Any], tested: bool = False) -> list[Any]:
        return encode(records, self.tool, self._config.data, tested)

    def count_cut(self, examples: Sequence[Example]) -> int:
        return sum(example.cut for example in examples)

    def loss(self, model: nn.Module, batch: Sequence[Example]) -> Tensor:
        device = next(model.parameters()).device
        settings = self._config.train
        rows = (pack if settings.packing else collate)(batch, self.tool.pad_token_id, device)
        return answer_loss(model, rows, chunk=settings.loss_chunk)

    def losses(self, model: nn.Module, batch: Sequence[Example]) -> Tensor:
        rows = collate(batch, self.tool.pad_token_id, next(model.parameters()).device)
        return token_losses(model, rows, self._config.train.loss_chunk).sum(1)

    def length(self, example: Example) -> int:
        return len(example.prompt) + len(example.answer)

    def count(self, batch: Sequence[Example]) -> int:
        return sum(example.terms for example in batch)

    def evaluate(
        self,
        model: nn.Module,
        clients: Sequence[Examined],
        meter: GateMeter | None = None,
        rows: ClientRows | None = None,
    ) -> list[dict[str, float]]:
        return evaluate_texts(model, self.tool, clients, self._config.evaluate, meter, rows)


class ImageTask:
    """Images and their classes."""

    shares_batches = False

    def __init__(self, config: Config, processor: Any, classes: dict[str, int]) -> None:
        self.tool, self._config, self._classes = processor, config, classes

    def encode(self, records: Sequence[Any], tested: bool = False) -> list[Any]:
        for record in records:
            if record.label not in self._classes:
                known = ", ".join(self._classes)
                raise InputError(
                    f"{record.name()}: the model has no class {record.label!r}; remove its images, "
                    f"known: {known}"
                )
        return [ImageExample(record, self._classes[record.label]) for record in records]

    def count_cut(self, examples: Sequence[ImageExample]) -> int:
        return 0

    def loss(self, model: nn.Module, batch: Sequence[ImageExample]) -> Tensor:
        return class_loss(model, self._pixels(batch), [example.label for example in batch])

    def losses(self, model: nn.Module, batch: Sequence[ImageExample]) -> Tensor:
        labels = [example.label for example in batch]
        return class_loss(model, self._pixels(batch), labels, reduction="none")

    def length(self, example: ImageExample) -> int:
        return PATCHES

    def count(self, batch: Sequence[ImageExample]) -> int:
        return len(batch)

    def evaluate(
        self,
        model: nn.Module,
        clients: Sequence[Examined],
        meter: GateMeter | None = None,
        rows: ClientRows | None = None,
    ) -> list[dict[str, float]]:
        (client,), size, found = clients, self._config.evaluate.batch_size, list[int]()
        scores = evaluate_images(model, self._pixels, client.examples, size, meter, found)
        if client.kept is not None:
            names = {place: name for name, place in self._classes.items()}
            client.kept.take([names[place] for place in found])
        return [scores]

    def _pixels(self, batch: Sequence[ImageExample]) -> Tensor:
        return pixels([example.record for example in batch], self.tool)
