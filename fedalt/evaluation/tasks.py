"""What the loop does not need to know of text or images: examples, their loss, their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from fedalt.config import Config
from fedalt.data import Example, ImageExample, collate, encode, pack, pixels
from fedalt.errors import InputError
from fedalt.evaluation.answers import Answers
from fedalt.evaluation.evaluate import evaluate_images, evaluate_text
from fedalt.model import GateMeter
from fedalt.training import answer_loss, class_loss, token_losses

PATCHES = 14 * 14 + 1
"""The tokens of an image as vision transformers mostly cut it."""


class Task(Protocol):
    """One kind of data, with the tokenizer or image processor of the base."""

    tool: Any

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
        examples: Sequence[Any],
        records: Sequence[Any],
        meter: GateMeter | None = None,
        kept: Answers | None = None,
    ) -> dict[str, float]:
        """Scores by name, the main one first.

        ``meter`` watches one pass over the examples, ``kept`` takes the answers.
        """
        ...


class TextTask:
    """Instructions and answers of a causal language model."""

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
        examples: Sequence[Example],
        records: Sequence[Any],
        meter: GateMeter | None = None,
        kept: Answers | None = None,
    ) -> dict[str, float]:
        settings = self._config.evaluate
        return evaluate_text(model, self.tool, examples, records, settings, meter, kept)


class ImageTask:
    """Images and their classes."""

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
        examples: Sequence[ImageExample],
        records: Sequence[Any],
        meter: GateMeter | None = None,
        kept: Answers | None = None,
    ) -> dict[str, float]:
        size = self._config.evaluate.batch_size
        if kept is None:
            return evaluate_images(model, self._pixels, examples, size, meter)
        found: list[int] = []
        scores = evaluate_images(model, self._pixels, examples, size, meter, found)
        names = {place: name for name, place in self._classes.items()}
        kept.take([names[place] for place in found])
        return scores

    def _pixels(self, batch: Sequence[ImageExample]) -> Tensor:
        return pixels([example.record for example in batch], self.tool)
