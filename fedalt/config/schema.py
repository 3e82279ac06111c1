"""What a run is: frozen dataclasses; every value is checked when one is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import yaml

from fedalt.config.data import DIGITS, SAMPLE, DataConfig, PartitionConfig
from fedalt.config.privacy import PrivacyConfig
from fedalt.config.train import AUTO, TrainConfig
from fedalt.errors import require, require_count_or_auto, require_one_of

__all__ = [
    "BUILTIN_BASE",
    "BUILTIN_VIT",
    "DIGITS",
    "SAMPLE",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "FederationConfig",
    "LoraConfig",
    "ModelConfig",
    "PartitionConfig",
    "PrivacyConfig",
    "TrainConfig",
]

BUILTIN_BASE, BUILTIN_VIT = "builtin", "builtin-vit"


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model that all clients share."""

    path: str = BUILTIN_BASE
    """A Hugging Face model id or folder, or a ``.gguf`` file, which is read into ``dtype``;
    ``builtin`` and ``builtin-vit`` are in the package."""
    dtype: str = "float32"
    """Of the base: ``float32``, ``bfloat16`` or ``float16``. What is trained is float32."""
    device: str = "cpu"
    """As PyTorch calls it: ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    quantization: str = "none"
    """How the frozen linear layers, but the output head, are stored: ``nf4`` (4 bits, scales
    quantized too) and ``int8`` by bitsandbytes, ``fp8`` (e4m3) by this package; ``none``: in
    ``dtype``, which the others compute in."""

    def __post_init__(self) -> None:
        require_one_of(("float32", "bfloat16", "float16"), "model.dtype", self.dtype)
        require_one_of(("none", "nf4", "int8", "fp8"), "model.quantization", self.quantization)


@dataclass(frozen=True)
class LoraConfig:
    """The adapters put into every targeted linear layer; the scale is ``alpha / rank``."""

    rank: int = 8
    """Columns of B and rows of A of each adapter."""
    alpha: float = 16.0
    """Each B A x is scaled by ``alpha / rank``."""
    dropout: float = 0.0
    """The share of an adapter's input that training leaves out."""
    target_modules: str | tuple[str, ...] = ("all-linear",)
    """Linear layers, as in PEFT: a list of names or their endings (``[q_proj, v_proj]``), or, as
    text, a regular expression that matches whole names; ``all-linear``: all but the output head."""
    impl: str = "auto"
    """How adapted layers are computed: ``triton``, ``torch``, ``reference``; ``auto`` chooses."""
    modules_to_save: tuple[str, ...] = ()
    """Whole modules trained beside the adapters, as in PEFT: a classifier's new head."""
    client_ranks: dict[str, int] = field(default_factory=dict)
    """Clients of another rank, for methods that can combine ranks; 0: trains no adapter."""
    client_starts: dict[str, str] = field(default_factory=dict)
    """By client, a PEFT adapter's folder that its individual LoRA starts from."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, "lora.rank", "at least 1", self.rank)
        require(self.alpha > 0, "lora.alpha", "above 0", self.alpha)
        require(0 <= self.dropout < 1, "lora.dropout", "in [0, 1)", self.dropout)
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            object.__setattr__(self, "target_modules", ("all-linear",))  # one way to say it
        named = "".join(self.target_modules) != ""
        require(named, "lora.target_modules", "a list of names or a pattern", self.target_modules)
        require_one_of(("auto", "triton", "torch", "reference"), "lora.impl", self.impl)
        for name, rank in self.client_ranks.items():
            require(rank >= 0, f"lora.client_ranks.{name}", "at least 0", rank)


@dataclass(frozen=True)
class FederationConfig:
    """Who takes part in a round, what the server refuses, how it averages, who joins later."""

    participation: float = 1.0
    """The share of known clients drawn in every round."""
    min_clients: int = 2
    """With fewer good updates nothing is combined in that round. Two clients of FedALT see each
    other's adapter as their Rest-of-World."""
    max_age: int = 5
    """Rounds for which an absent client's last counted update counts in a Rest-of-World."""
    stragglers: float = 0.0
    """The share of drawn clients whose update misses its round. Where a method's Rest-of-World
    counts absent clients it counts from the next round, like theirs; elsewhere it never does."""
    away: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By client, the rounds in which it cannot be drawn."""
    aggregate: str = "mean"
    """``mean``, ``trimmed`` (of each number, the ``trim`` share at both ends is left out),
    ``median``, or ``clipped`` (changes of more than the median norm are scaled down to it; of what
    a Rest-of-World last counted of the client, else of what the client started from)."""
    trim: float = 0.1
    """Of ``aggregate: trimmed``: the share of the clients left out at either end."""
    max_norm_ratio: float | None = 10.0
    """An update of more than this times the round's median norm is refused; null: never."""
    round_timeout: float = 3600.0
    """Seconds that a server gives its sites for a round; who answers later is absent from it."""
    secure: bool = False
    """Between sites: the server gets masked updates and learns their sum alone, by Flower's
    SecAgg+, of three clients or more (``docs/sites.md`` has its limits)."""
    holdout: float = 0.0
    """The share of clients kept out of training, who join after the last round."""
    join_epochs: int = 5
    """Passes over its train records by which an unseen client fits itself in."""
    join_start: str = "row"
    """Where an unseen client's individual LoRA starts: ``fresh``, ``row``, ``nearest``."""

    def __post_init__(self) -> None:
        share = 0 < self.participation <= 1
        require(share, "federation.participation", "in (0, 1]", self.participation)
        require(self.min_clients >= 2, "federation.min_clients", "at least 2", self.min_clients)
        require(self.max_age >= 0, "federation.max_age", "at least 0", self.max_age)
        require(0 <= self.stragglers < 1, "federation.stragglers", "in [0, 1)", self.stragglers)
        require_one_of(
            ("mean", "trimmed", "median", "clipped"), "federation.aggregate", self.aggregate
        )
        require(0 <= self.trim < 0.5, "federation.trim", "in [0, 0.5)", self.trim)
        ratio_ok = self.max_norm_ratio is None or self.max_norm_ratio > 1
        require(ratio_ok, "federation.max_norm_ratio", "above 1, or null", self.max_norm_ratio)
        require(self.round_timeout > 0, "federation.round_timeout", "above 0", self.round_timeout)
        require(0 <= self.holdout < 1, "federation.holdout", "in [0, 1)", self.holdout)
        require(self.join_epochs >= 1, "federation.join_epochs", "at least 1", self.join_epochs)
        require_one_of(("fresh", "row", "nearest"), "federation.join_start", self.join_start)


@dataclass(frozen=True)
class EvaluateConfig:
    """Generation and scoring of the test records."""

    every: int = 1
    """Rounds between evaluations; round 0 and the last are always evaluated."""
    batch_size: int = 128
    """Records that are scored at once."""
    together: int | str = 1
    """Clients whose records share these batches, so that one pass over the base serves them; each
    gets the scores that it gets alone, but for rounding. ``auto``: as many as fill one. Images, and
    clients with trained heads, are scored one by one."""
    max_new_tokens: int = 80
    """The longest generated answer, in tokens."""
    num_beams: int = 1
    """Beams of the search for an answer; 1: greedy."""
    parts: bool = True
    """After the last round, score each of a client's two adapters alone as well."""

    answers: int = 5
    """Test questions of each client that the run's record keeps word for word, with the answers
    before and after training; 0: none."""

    def __post_init__(self) -> None:
        for name in ("every", "batch_size", "max_new_tokens", "num_beams"):
            value = getattr(self, name)
            require(value >= 1, f"evaluate.{name}", "at least 1", value)
        require_count_or_auto("evaluate.together", self.together)
        require(self.answers >= 0, "evaluate.answers", "at least 0", self.answers)


@dataclass(frozen=True)
class Config:
    """A whole run. Equal configs, data and device give bit-identical runs."""

    method: str = "fedalt"
    """What is trained, sent and installed, by name: ``fedalt``, ``local``, ``fedit``, ..."""
    rounds: int = 6
    """Of local training, each with an exchange after it."""
    seed: int = 0
    """Of everything that is drawn."""
    out: str = ""
    """The run directory; empty: ``runs/<data>-<method>``, numbered when that is taken."""
    threads: int | None = None
    """CPU threads of PyTorch; null: PyTorch's own choice. On a busy machine 1 is often faster."""
    save_total_limit: int = 2
    """Checkpoints kept; the oldest go first."""
    report_to: tuple[str, ...] = ()
    """Trackers that are told every finished round of ``fedalt run``: ``tensorboard``, ``wandb``,
    ``mlflow``."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)

    def __post_init__(self) -> None:
        require(self.rounds >= 1, "rounds", "at least 1", self.rounds)
        require(0 <= self.seed < 2**31, "seed", "in [0, 2^31)", self.seed)
        require(self.save_total_limit >= 1, "save_total_limit", "at least 1", self.save_total_limit)
        for name in self.report_to:
            require_one_of(("tensorboard", "wandb", "mlflow"), "report_to", name)
        other = {"text": BUILTIN_VIT, "image": BUILTIN_BASE}[self.data.kind]
        fits = self.model.path != other
        require(fits, "model.path", f"a model for data.kind={self.data.kind}", self.model.path)
        text = self.data.kind == "text"
        require(text or not self.train.packing, "train.packing", "false of images", True)
        threads_ok = self.threads is None or self.threads >= 1
        require(threads_ok, "threads", "at least 1, or null", self.threads)
        together, alone = self.train.together, self.trains_alone
        fits = together in (1, AUTO) or not alone
        require(fits, "train.together", f"1 or {AUTO} with {alone}", together)
        held = self.federation.holdout
        apart = "false with privacy.record_clip, whose norms are those of single records"
        require(not (self.train.packing and self.privacy.on), "train.packing", apart, True)
        wanted = "0 with privacy.record_clip, since who joins later fits itself in without noise"
        require(not (held and self.privacy.on), "federation.holdout", wanted, held)
        on_gpu = not self.model.device.startswith("cpu")
        paged = self.train.optimizer == "paged_adamw_8bit"
        wanted = "adamw or adamw_8bit on a CPU, which has no other memory to page to"
        require(on_gpu or not paged, "train.optimizer", wanted, self.train.optimizer)
        offload = self.train.offload_activations
        wanted = "false on a CPU, which has no other memory to offload to"
        require(on_gpu or not offload, "train.offload_activations", wanted, offload)

    @property
    def trains_alone(self) -> str:
        """The setting under which clients cannot train together, if there is one."""
        train = self.train
        found = {
            "privacy.record_clip": self.privacy.on,
            "train.packing": train.packing,
            "train.micro_batch": (train.micro_batch or train.batch_size) < train.batch_size,
            "lora.modules_to_save": self.lora.modules_to_save,
        }
        return next((key for key, on in found.items() if on), "")

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
            if dataclasses.is_dataclass(getattr(self, key)):
                rows.update({f"{key}.{inner}": v for inner, v in value.items()})
            else:
                rows[key] = value
        return rows


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple) else value
