"""What memory a run will need, told beforehand: the ``fedalt memory`` command."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedalt.config import Config
from fedalt.memory.free import free_bytes
from fedalt.memory.rehearsal import Bytes, Rehearsal
from fedalt.memory.tracker import Kind
from fedalt.methods import get_method
from fedalt.report import table

MARGIN = 1.1
"""What must be free over what is foretold: workspaces of libraries and gaps are not in it."""
SMALL_CHUNK = 64

Settings = Mapping[str, Any]
"""By dotted key, such as ``train.micro_batch``."""


@dataclass(frozen=True)
class Need:
    """The bytes of a run at the peaks of its training and of its evaluation, by kind."""

    training: Bytes
    evaluation: Bytes

    @property
    def peak(self) -> int:
        return max(self.training.total(), self.evaluation.total())


class Planner:
    """Needs of one run under any options."""

    def __init__(self, config: Config) -> None:
        self.config, self.rehearsal = config, Rehearsal(config)

    def need(self, settings: Settings) -> Need:
        """The need with ``settings`` over the config's."""
        config = with_settings(self.config, settings)
        quantization = config.model.quantization
        return Need(
            self.rehearsal.training(config.train, quantization),
            self.rehearsal.evaluation(config.evaluate, quantization),
        )

    def options(self) -> Iterator[Settings]:
        """The options that are not on yet, one at a time; what they cost rises along the way."""
        train, micro_batch, scored = self.config.train, self._micro_batch(), self.scored
        if self.config.data.kind == "text" and (train.loss_chunk or SMALL_CHUNK + 1) > SMALL_CHUNK:
            yield {"train.loss_chunk": SMALL_CHUNK}
        alone = {} if self.rehearsal.together(train) == 1 else {"train.together": 1}
        if alone:
            yield alone
        if micro_batch > 1:
            yield {**alone, "train.micro_batch": micro_batch // 2}
        if scored > 1:
            yield {"evaluate.batch_size": scored // 2}
        if not train.gradient_checkpointing and self.rehearsal.recomputes:
            yield {"train.gradient_checkpointing": True}
        if train.optimizer == "adamw":
            yield {"train.optimizer": "adamw_8bit"}
        if not train.offload_activations and self.rehearsal.device.type == "cuda":
            yield {"train.offload_activations": True}
        changes_base = get_method(self.config.method).changes_base
        if self.config.model.quantization == "none" and not changes_base:
            yield from ({"model.quantization": kind} for kind in ("int8", "fp8", "nf4"))

    def cure(self, free: int) -> tuple[Settings | None, int]:
        """The fewest options with which the run fits into ``free`` bytes, and what it then needs.

        Of as many, those that cost least. None where all together do not suffice, with what is
        needed then.
        """
        steps = [self._lowest(option) for option in self.options()]
        least = self.need(_merged(steps)).peak
        if not fits(least, free):
            return None, least
        for count in range(1, len(steps) + 1):
            for chosen in itertools.combinations(steps, count):
                keys = [key for option in chosen for key in option]
                settings = _merged(chosen)
                if len(keys) == len(settings) and fits(self.need(settings).peak, free):
                    relaxed = self._relaxed(settings, free)
                    return relaxed, self.need(relaxed).peak
        return None, least

    def _lowest(self, option: Settings) -> Settings:
        sizes = ("train.micro_batch", "evaluate.batch_size")
        return {key: 1 if key in sizes else value for key, value in option.items()}

    def _relaxed(self, settings: Settings, free: int) -> Settings:
        """The same with sizes of batches as large as they may be."""
        most = {
            "train.micro_batch": self._micro_batch(),
            "evaluate.batch_size": self.scored,
        }
        for key in most.keys() & settings.keys():
            size = most[key] // 2
            while size > 1 and not fits(self.need({**settings, key: size}).peak, free):
                size //= 2
            settings = {**settings, key: max(1, size)}
        return settings

    def _micro_batch(self) -> int:
        """The examples that are run at once."""
        train = self.config.train
        most = min(train.batch_size, self.rehearsal.assumed.train)
        return min(train.micro_batch or most, most)

    @property
    def scored(self) -> int:
        """The examples that are evaluated at once."""
        return min(self.config.evaluate.batch_size, self.rehearsal.assumed.test)


def foretell(config: Config) -> str:
    """Tables of what a run will need and of what each option would save, and whether it fits.

    Of the model's files only its configuration is read; weights are not.

    Raises:
        InputError: bad data, method, model, device or target.
    """
    planner = Planner(config)
    rehearsal, need = planner.rehearsal, planner.need({})
    base, assumed = config.model, rehearsal.assumed
    size, scored = str(min(config.train.batch_size, assumed.train)), planner.scored
    trained, tested = assumed.size
    clients = rehearsal.together(config.train)
    size = f"{clients} clients of {size}" if clients > 1 else size
    lines = [
        f"{base.path} in {base.dtype}, quantization {base.quantization}, on {rehearsal.device}",
        f"training on {size} x {trained}; evaluation on {scored} x {tested} ({assumed.source})",
        "",
        table(
            ("MiB at the peak", "training", "evaluation"),
            [
                [kind, _mib(need.training[kind]), _mib(need.evaluation[kind])]
                for kind in Kind
                if max(need.training[kind], need.evaluation[kind]) > 2**14
            ]
            + [["peak", _mib(need.training.total()), _mib(need.evaluation.total())]],
        ),
        "",
        table(
            ("with", "training", "evaluation", "lowers the peak by"),
            [_row(planner, option, need) for option in planner.options()],
        ),
        "",
        _verdict(planner, need.peak, free_bytes(rehearsal.device)),
    ]
    return "\n".join(lines)


def _row(planner: Planner, option: Settings, before: Need) -> list[str]:
    after = planner.need(option)
    totals = after.training.total(), after.evaluation.total(), before.peak - after.peak
    return [_told(option), *map(_mib, totals)]


def _verdict(planner: Planner, peak: int, free: int | None) -> str:
    device = planner.rehearsal.device
    if free is None:
        return f"{_mib(peak)} MiB are needed; this system does not tell what is free on {device}"
    told = f"{_mib(peak)} MiB are needed, {_mib(free)} MiB are free on {device}"
    if fits(peak, free):
        return f"{told}: fits"
    settings, least = planner.cure(free)
    if settings is None:
        return f"{told}: does not fit, nor with all of these options: {_mib(least)} MiB"
    told_settings = " ".join(f"-c {_told({key: value})}" for key, value in settings.items())
    return f"{told}: does not fit; with {told_settings} it needs {_mib(least)} MiB and fits"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"


def _told(settings: Settings) -> str:
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in settings.items()
    )


def fits(peak: int, free: int) -> bool:
    """Whether a foretold peak leaves the margin."""
    return MARGIN * peak <= free


def with_settings(config: Config, settings: Settings) -> Config:
    """The config with dotted keys set."""
    for key, value in settings.items():
        group, _, name = key.partition(".")
        changed: Any = {group: replace(getattr(config, group), **{name: value})}
        config = replace(config, **changed)
    return config


def _merged(options: Any) -> dict[str, Any]:
    return {key: value for option in options for key, value in option.items()}
