"""Where the data of a run comes from and how it is cut: two sections of the config."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fedalt.errors import require, require_encodable, require_one_of

SAMPLE, DIGITS = "sample", "digits"
CHAT = "chat"
PROMPTS = {
    "instruction": (
        "### Instruction:\n{instruction}\n\n### Response:\n",
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    ),
    "plain": ("{instruction}\n", "{instruction}\n\n{input}\n"),
}
"""By name, the prompt of a record without an input, and of one with it."""


@dataclass(frozen=True)
class DataConfig:
    """Where the clients' records are and how one becomes tokens."""

    path: str = SAMPLE
    """Folders, one a client: ``train.jsonl`` and ``test.jsonl`` (or ``.jsonl.gz``), or images in
    ``train/CLASS`` and ``test/CLASS``. Of images also one a domain: ``DOMAIN/CLASS``. Or a
    `datasets` dataset that ``partition`` cuts into clients: files (jsonl, json, csv, parquet,
    arrow; ``.gz`` and ``*`` are understood), a folder of such or from ``save_to_disk``, or a hub
    id, ``owner/name`` or ``owner/name:config``. Or ``sample`` or ``digits``, the federations in the
    package."""
    kind: str = "text"
    """``text``: instructions and answers. ``image``: images and class names."""
    sources: dict[str, str] = field(default_factory=dict)
    """In place of ``path``: by client, its own `datasets` dataset, which is not cut."""
    splits: tuple[str, ...] = ("train",)
    """Of a `datasets` dataset, the splits that are joined before they are cut."""
    columns: dict[str, str] = field(default_factory=dict)
    """By field of a row, its column where that has another name, such as
    ``-c 'data.columns={output: answer}'``. Fields of texts: ``instruction``, ``output``, ``input``,
    ``category``, ``options``, or ``messages``; of images: ``image`` (also found as ``img``),
    ``label`` (``fine_label``), ``category``; of a suite: its own columns."""
    format: str = "auto"
    """How rows of a `datasets` dataset become texts: ``records`` have the fields above;
    ``hellaswag``, ``boolq``, ``piqa``, ``siqa``, ``winogrande``, ``arc``, ``openbookqa`` are as on
    the hub; ``auto`` goes by the columns."""
    test_share: float = 0.2
    """The share of a client's records that tests, where its data has no test part."""
    clients: tuple[str, ...] = ()
    """Only these clients, in this order; empty: all, in the order of their names (``sample`` and
    ``digits``: in their own)."""
    prompt: str = PROMPTS["instruction"][0]
    """What a model reads before a record's answer: a text with ``{instruction}``; ``instruction``,
    the default's name; ``plain``, the bare words; or ``chat``, the base's own chat template, in
    which records with ``messages`` always are."""
    prompt_with_input: str = PROMPTS["instruction"][1]
    """The same for a record that has an ``input``; a name of ``prompt`` sets both."""
    max_length: int = 512
    """Tokens of prompt and answer together; of a longer record the answer keeps its first half of
    them, the prompt its end."""

    @property
    def name(self) -> str:
        """What messages, reports and folders of runs call these data."""
        return "sources" if self.sources else Path(self.path).name

    def __post_init__(self) -> None:
        require_one_of(("text", "image"), "data.kind", self.kind)
        suites = ("hellaswag", "boolq", "piqa", "siqa", "winogrande", "arc", "openbookqa")
        require_one_of(("auto", "records", *suites), "data.format", self.format)
        one = not self.sources or self.path == SAMPLE
        require(one, "data.path", "left out where data.sources is given", self.path)
        require(0 < self.test_share < 1, "data.test_share", "in (0, 1)", self.test_share)
        once = 0 < len(self.splits) == len(set(self.splits))
        require(once, "data.splits", "a list of different names", list(self.splits))
        require(self.max_length >= 8, "data.max_length", "at least 8", self.max_length)
        if self.prompt in PROMPTS:
            usual = self.prompt_with_input == PROMPTS["instruction"][1]
            wanted = f"left out beside data.prompt={self.prompt}"
            require(usual, "data.prompt_with_input", wanted, self.prompt_with_input)
            for name, text in zip(
                ("prompt", "prompt_with_input"), PROMPTS[self.prompt], strict=True
            ):
                object.__setattr__(self, name, text)
        known = self.prompt == CHAT or "{instruction}" in self.prompt
        wanted = f"a name ({CHAT}, {', '.join(PROMPTS)}) or a text with {{instruction}}"
        require(known, "data.prompt", wanted, self.prompt)
        require(
            "{instruction}" in self.prompt_with_input and "{input}" in self.prompt_with_input,
            "data.prompt_with_input",
            "a text with {instruction} and {input}",
            self.prompt_with_input,
        )
        require_encodable(self.prompt, "data.prompt")
        require_encodable(self.prompt_with_input, "data.prompt_with_input")


@dataclass(frozen=True)
class PartitionConfig:
    """How one dataset is cut into clients."""

    by: str = ""
    """``column``: a client a value. ``dirichlet``: shares of every label drawn from Dir(alpha).
    ``pathological``: ``classes`` labels a client. ``equal``: at random. Empty: not cut."""
    column: str = ""
    """The column of the label, or of the task or domain that makes a client; in a folder of
    domains ``domain``."""
    superclasses: dict[str, str] = field(default_factory=dict)
    """For ``dirichlet``, by label, the superclass that stands in its place; empty: the label
    itself. A column of superclasses, such as CIFAR-100's ``coarse_label``, needs none."""
    clients: int = 8
    """How many; with ``column`` the values decide, but more clients than there are folders of
    domains share these equally."""
    alpha: float = 0.3
    """Of ``dirichlet``: the lower, the fewer clients hold most of a label."""
    classes: int = 10
    """Of ``pathological``: labels a client."""
    min_records: int = 10
    """A draw that leaves a client fewer records is repeated; with ``column`` it is refused."""

    def __post_init__(self) -> None:
        known = ("", "column", "dirichlet", "pathological", "equal")
        require(self.by in known, "partition.by", f"one of {', '.join(known[1:])}", self.by)
        wants_column = self.by in ("column", "dirichlet", "pathological")
        require(bool(self.column) or not wants_column, "partition.column", "a column's name", "")
        require(self.clients >= 1, "partition.clients", "at least 1", self.clients)
        require(
            bool(self.by) or not self.column, "partition.by", "given beside partition.column", ""
        )
        only_dirichlet = self.by == "dirichlet" or not self.superclasses
        require(only_dirichlet, "partition.by", "dirichlet, to cut by superclasses", self.by)
        require(self.alpha > 0, "partition.alpha", "above 0", self.alpha)
        require(self.classes >= 1, "partition.classes", "at least 1", self.classes)
        require(self.min_records >= 2, "partition.min_records", "at least 2", self.min_records)
