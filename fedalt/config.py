"""What a run is: frozen dataclasses, read from YAML, every key checked by name and by type."""

from __future__ import annotations

import dataclasses
import difflib
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from fedalt.errors import InputError

SAMPLE = "sample"
BUILTIN_BASE = "builtin"


def _require(condition: bool, key: str, wanted: str, got: object) -> None:
    if not condition:
        raise InputError(f"{key} must be {wanted}, got {got!r}")


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model that all clients share."""

    path: str = BUILTIN_BASE
    """A Hugging Face model id or folder; ``builtin`` is the tiny base in the package."""
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        dtypes = ("float32", "bfloat16", "float16")
        _require(self.dtype in dtypes, "model.dtype", f"one of {', '.join(dtypes)}", self.dtype)


@dataclass(frozen=True)
class LoraConfig:
    """The adapters put into every targeted linear layer; the scale is ``alpha / rank``."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    """Names of linear layers (``q_proj``), as in PEFT; ``all-linear``: all but the output head."""
    impl: str = "auto"
    """How adapted layers are computed: ``triton`` on a GPU, ``torch``, ``reference``."""

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "lora.rank", "at least 1", self.rank)
        _require(self.alpha > 0, "lora.alpha", "above 0", self.alpha)
        _require(0 <= self.dropout < 1, "lora.dropout", "in [0, 1)", self.dropout)
        _require(len(self.target_modules) > 0, "lora.target_modules", "a list of names", [])
        known = ("auto", "triton", "torch", "reference")
        _require(self.impl in known, "lora.impl", f"one of {', '.join(known)}", self.impl)


@dataclass(frozen=True)
class DataConfig:
    """Where the clients' records are and how one becomes tokens."""

    path: str = SAMPLE
    """A folder with one folder a client; ``sample`` is the federation in the package."""
    clients: tuple[str, ...] = ()
    """Only these clients, in this order; empty: every folder, in the order of their names."""
    prompt: str = "### Instruction:\n{instruction}\n\n### Response:\n"
    prompt_with_input: str = (
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    )
    max_length: int = 512
    """Tokens of prompt and answer together; a longer prompt loses its beginning."""

    def __post_init__(self) -> None:
        _require(self.max_length >= 8, "data.max_length", "at least 8", self.max_length)
        _require("{instruction}" in self.prompt, "data.prompt", "a text with {instruction}", "none")
        _require(
            "{instruction}" in self.prompt_with_input and "{input}" in self.prompt_with_input,
            "data.prompt_with_input",
            "a text with {instruction} and {input}",
            self.prompt_with_input,
        )


@dataclass(frozen=True)
class TrainConfig:
    """Local training of one client in one round; optimizer and schedule start afresh each round."""

    batch_size: int = 16
    epochs: int = 5
    max_steps: int | None = 30
    """Steps a round whatever the number of records; null: ``epochs`` passes over the records."""
    learning_rate: float = 4e-3
    weight_decay: float = 0.0
    lr_scheduler: str = "linear"
    """What follows the warm-up: ``linear`` or ``cosine`` decay to zero, or ``constant``."""
    warmup_steps: int = 3
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "train.batch_size", "at least 1", self.batch_size)
        _require(self.epochs >= 1, "train.epochs", "at least 1", self.epochs)
        steps_ok = self.max_steps is None or self.max_steps >= 1
        _require(steps_ok, "train.max_steps", "at least 1, or null", self.max_steps)
        _require(self.learning_rate > 0, "train.learning_rate", "above 0", self.learning_rate)
        _require(self.weight_decay >= 0, "train.weight_decay", "at least 0", self.weight_decay)
        _require(self.warmup_steps >= 0, "train.warmup_steps", "at least 0", self.warmup_steps)
        _require(self.max_grad_norm > 0, "train.max_grad_norm", "above 0", self.max_grad_norm)
        schedules = ("linear", "cosine", "constant")
        known = self.lr_scheduler in schedules
        wanted = f"one of {', '.join(schedules)}"
        _require(known, "train.lr_scheduler", wanted, self.lr_scheduler)


@dataclass(frozen=True)
class EvaluateConfig:
    """Generation and scoring of the test records."""

    every: int = 1
    """Rounds between evaluations; round 0 and the last are always evaluated."""
    batch_size: int = 128
    max_new_tokens: int = 80
    num_beams: int = 1

    def __post_init__(self) -> None:
        for name in ("every", "batch_size", "max_new_tokens", "num_beams"):
            value = getattr(self, name)
            _require(value >= 1, f"evaluate.{name}", "at least 1", value)


@dataclass(frozen=True)
class Config:
    """A whole run. Equal configs, data and device give bit-identical runs."""

    method: str = "fedalt"
    rounds: int = 6
    seed: int = 0
    out: str = ""
    """The run directory; empty: ``runs/<data>-<method>``, numbered when that is taken."""
    threads: int | None = None
    """CPU threads of PyTorch; null: PyTorch's own choice. On a busy machine 1 is often faster."""
    save_total_limit: int = 2
    """Checkpoints kept; the oldest go first."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        _require(self.rounds >= 1, "rounds", "at least 1", self.rounds)
        _require(0 <= self.seed < 2**31, "seed", "in [0, 2^31)", self.seed)
        _require(
            self.save_total_limit >= 1, "save_total_limit", "at least 1", self.save_total_limit
        )
        threads_ok = self.threads is None or self.threads >= 1
        _require(threads_ok, "threads", "at least 1, or null", self.threads)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain nested dicts and lists, every key present."""
        return _plain(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        """The config as YAML that ``load_config`` reads back to an equal config."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def flat(self) -> dict[str, Any]:
        """Every setting by its dotted key, such as ``train.batch_size``."""
        rows: dict[str, Any] = {}
        for key, value in self.to_dict().items():
            if isinstance(value, dict):
                rows.update({f"{key}.{inner}": v for inner, v in value.items()})
            else:
                rows[key] = value
        return rows


def load_config(path: str | Path | None = None, overrides: tuple[str, ...] = ()) -> Config:
    """Read a YAML file (none: all defaults), lay ``key.path=value`` overrides over it, check all.

    Raises:
        InputError: the file is missing or no YAML mapping, or a key or value is not known.
    """
    settings: dict[str, Any] = {}
    where = "config"
    if path is not None:
        where = str(path)
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: cannot read the config: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InputError(f"{path}: not UTF-8 text; save the config as UTF-8") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f"{mark.line + 1}: " if mark else " "
            problem = getattr(error, "problem", None) or "not readable"
            raise InputError(f"{path}:{line}broken YAML: {problem}") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise InputError(f"{path}: wants a mapping of settings, got {type(loaded).__name__}")
        settings = loaded or {}
    for override in overrides:
        _apply_override(settings, override)
    try:
        return config_from_dict(settings)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def config_from_dict(settings: dict[str, Any]) -> Config:
    """Build a ``Config`` from nested dicts; unknown keys and wrong types raise ``InputError``."""
    return _build(Config, settings, prefix="")


def _apply_override(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"-c {override}: wants key.path=value, such as -c train.batch_size=8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"-c {override}: the value is not readable as YAML") from None
    *parents, last = key.split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {})
        if not isinstance(settings, dict):
            raise InputError(f"-c {override}: {parent!r} holds a value, not a group of settings")
    settings[last] = value


def _build(cls: type, settings: dict[str, Any], prefix: str) -> Any:
    hints = get_type_hints(cls)
    values = {}
    for key, value in settings.items():
        if key not in hints:
            raise InputError(f"unknown key {prefix}{key}{_nearest(str(key), prefix)}")
        kind = hints[key]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            if not isinstance(value, dict):
                raise InputError(f"{prefix}{key} must be a group of settings, got {value!r}")
            values[key] = _build(kind, value, prefix=f"{key}.")
        else:
            values[key] = _coerce(kind, value, prefix + key)
    return cls(**values)


def _nearest(key: str, prefix: str) -> str:
    """A hint at the key that was meant: of the same group first, then a leaf of any other."""
    known = list(Config().flat())
    siblings = [name for name in known if prefix and name.startswith(prefix)]
    leaves = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(prefix + key, siblings, n=1, cutoff=0.8)
    near = near or [leaves[leaf] for leaf in difflib.get_close_matches(key, leaves, n=1)]
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(siblings or known)}"


def _coerce(kind: Any, value: Any, key: str) -> Any:
    """``value`` as ``kind``; an int may stand for a float, and one word for a list of one."""
    if get_origin(kind) in (Union, types.UnionType):
        if value is None:
            return None
        kind = next(option for option in get_args(kind) if option is not type(None))
    if get_origin(kind) is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list | tuple) and all(isinstance(item, str) for item in items):
            return tuple(items)
        raise InputError(f"{key} must be a list of names, got {value!r}")
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 3e-4 as text
        try:
            return float(value)
        except ValueError:
            raise InputError(f"{key} must be a number, got {value!r}") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise InputError(f"{key} must be {names[kind]}, got {value!r}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple) else value
