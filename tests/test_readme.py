"""What the README, the documentation and the examples say can be run, runs; and is said once."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fedalt
from bench.__main__ import _parser as bench_parser
from fedalt.cli import _parser as fedalt_parser
from fedalt.config import ModelConfig
from fedalt.methods import Combined, Method, Round
from fedalt.methods import robust as robust_means
from fedalt.methods.fedalt import FedALT
from fedalt.model import load_base
from fedalt.serving import export_client
from fedalt_kernels import MixedLoRALinear
from scripts import house

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))
RUN = {"README.md", "CONTRIBUTING.md", "layer.md", "runs.md"}
"""Pages with Python in them; each has its test below."""
OLD_RUN = ROOT / "tests" / "run" / "before_rooms"
MOST_LINES = 200
LONG = 20
"""Words in a row that may not stand in two pages."""


def text_of(page: Path) -> str:
    return page.read_text("utf-8")


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text_of(page), re.S | re.M)


def run(page: Path, **names: Any) -> dict[str, Any]:
    """Runs a page's blocks one after another, in one namespace."""
    for number, block in enumerate(blocks(page), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    return names


def prose(page: Path) -> str:
    """Without what is fenced off."""
    return re.sub(r"^ *```.*?^ *```", "", text_of(page), flags=re.S | re.M)


def test_every_page_with_code_is_run() -> None:
    assert {page.name for page in PAGES if blocks(page)} == RUN


def test_the_readme_is_short() -> None:
    assert len(text_of(README).splitlines()) <= MOST_LINES


def test_the_readme_runs() -> None:
    model, _ = load_base(ModelConfig())
    names = run(README, model=model, clients_models=[model, model])
    assert names["y"].shape == (4, 512, 1024)
    assert len(names["rows"]) == 2
    assert any(isinstance(module, MixedLoRALinear) for module in model.modules())


def test_the_layers_page_runs() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = {"x": (70, 32), "weight": (24, 32), "bias": (24,), "mixer": (2, 32)}
    shapes |= {"a0": (4, 32), "b0": (24, 4), "a1": (4, 32), "b1": (24, 4)}
    tensors = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    model, _ = load_base(ModelConfig())
    fedalt.inject(model)
    first, function, grouped, quantized = blocks(ROOT / "docs" / "layer.md")
    exec(first, {"model": model, "tokens": torch.arange(5, 15).view(1, -1)})
    exec(function, tensors)
    assert tensors["y"].shape == (70, 24)
    names: dict[str, Any] = {}
    exec(grouped, names)
    assert names["y"].shape == (4, 16, 64)
    exec(quantized, names)
    assert names["y"].shape == (4, 32, 1024)
    assert names["w"].shape == (1024, 1024)


def test_the_page_of_runs_runs(tmp_path, monkeypatch) -> None:
    shutil.copytree(OLD_RUN / "run", tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    export_client("runs/mine", "ann", "adapters/ann")
    names = run(ROOT / "docs" / "runs.md")
    assert names["answer"].shape[1] > names["prompt"].input_ids.shape[1]
    assert any(isinstance(module, MixedLoRALinear) for module in names["model"].modules())
    assert len(names["answers"]) == 2


def test_methods_that_are_added_as_told_combine() -> None:
    given = {"Method": Method, "Combined": Combined, "Round": Round, "FedALT": FedALT}
    names = run(ROOT / "CONTRIBUTING.md", robust=robust_means, Install=Any, **given)
    values = {"ann": 1.0, "bob": 2.0, "cat": 6.0}
    updates = {client: {"a": torch.tensor([value])} for client, value in values.items()}
    counted = Round(1, updates, dict.fromkeys(values, 1), alpha=16, rank=8)
    median = names["FedMedian"]().combine(counted).install("ann")
    assert median["a"].tolist() == [2.0]
    row = names["HalfOld"]().row(counted)("ann")
    assert row["a"].tolist() == [(4.0 + 3.0) / 2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    local = [link for link in links if not link.startswith("https://")]
    for link in local:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem != "CHANGELOG"], ids=lambda p: p.name)
def test_files_and_commands_that_are_named_are_there(page: Path) -> None:
    text = text_of(page)
    tops = "fedalt|fedalt_kernels|tests|bench|configs|docs|scripts|examples"
    for path in re.findall(rf"(?<![\w/.])(?:{tops})/[\w/.-]+\.(?:py|md|yaml|svg|json)\b", text):
        assert (ROOT / path).is_file(), path
    targets = re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.M)
    assert set(re.findall(r"(?:`|^)make\s([\w-]+)", text, re.M)) <= set(targets)
    assert set(re.findall(r"(?:`|^)fedalt ([a-z]+)", text, re.M)) <= commands(fedalt_parser())
    assert set(re.findall(r"python -m bench ([a-z]+)", text)) <= commands(bench_parser())


def commands(parser: Any) -> set[str]:
    return {name for action in parser._actions for name in action.choices or ()}


def test_the_rooms_are_those_that_are_named() -> None:
    drawn = re.search(r"^fedalt/\n(.*?)^fedalt_kernels/", text_of(README), re.S | re.M)
    assert drawn
    assert sorted(re.findall(r"^  (\w+)/", drawn[1], re.M)) == house.rooms()
    floors = re.search(
        r"^ +fedalt, __main__ .*?^ +errors$", text_of(ROOT / "CONTRIBUTING.md"), re.S | re.M
    )
    assert floors
    named = [set(re.findall(r"\w+", line[:32])) for line in floors[0].splitlines()]
    assert named == [set(floor) for floor in reversed(house.FLOORS)]


def test_nothing_is_said_twice() -> None:
    said: dict[tuple[str, ...], str] = {}
    for page in PAGES:
        for run_of_words in set(long_runs(text_of(page))):
            other = said.setdefault(run_of_words, page.name)
            assert other == page.name, f"{other} and {page.name}: {' '.join(run_of_words)}"


def long_runs(text: str) -> Iterator[tuple[str, ...]]:
    """Every ``LONG`` words in a row within a paragraph."""
    for paragraph in re.split(r"\n\s*\n", text):
        words = re.findall(r"\w+", paragraph.lower())
        yield from (tuple(words[i : i + LONG]) for i in range(len(words) - LONG + 1))


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_an_example_runs(path: Path) -> None:
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
    assert done.stdout
