"""Who may import whom: the arrows of the design, read from the source without running it."""

import ast
from pathlib import Path

import pytest

import fedalt_kernels

ROOT = Path(__file__).parents[1]
PACKAGES = ("fedalt", "fedalt_kernels")

# Every arrow of the kernels; a module of Triton kernels may import only its own shared parts.
KERNELS = {
    "": {"api", "fp8", "layer", "quantized"},
    "adapter": set(),
    "dropout": set(),
    "quantized": set(),
    "fp8": {"quantized"},
    "reference": {"adapter", "dropout"},
    "merged": {"adapter", "dropout", "quantized"},
    "weights": {"quantized", "triton.dequantize"},
    "fused": {
        "adapter",
        "quantized",
        "weights",
        "triton",
        "triton.backward",
        "triton.contract",
        "triton.decode",
        "triton.dropout",
        "triton.forward",
        "triton.overlapped",
        "triton.overlapped_backward",
        "triton.pack",
        "triton.reduce",
        "triton.tiles",
    },
    "operators": {"adapter", "fused", "merged", "quantized"},
    "autograd": {"adapter", "fused", "merged", "operators", "quantized"},
    "choice": {"quantized", "triton", "triton.workspace"},
    "checks": {"adapter", "dropout", "quantized"},
    "api": {"adapter", "autograd", "checks", "choice", "dropout", "quantized", "reference"},
    "sharing": {"adapter", "choice", "dropout", "fused"},
    "layer": {"adapter", "api", "checks", "quantized", "sharing"},
}
# The loop is ordered from the command down: nothing imports what stands above it.
COMMANDS = [
    "__main__",
    "cli",
    "compare",
    "export",
    "run",
    "rounds",
    "join",
    "memory",
    "rehearsal",
    "stage",
    "tasks",
]
STRANGERS = {"client", "server", "evaluate"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for name in PACKAGES for path in (ROOT / name).rglob("*.py")}


def imported(module: str) -> set[str]:
    """The modules of this project that a module names in its imports, functions included."""
    found = set()
    path = SOURCES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parents = package.split(".")
                above = parents[: len(parents) - node.level + 1]
                source = ".".join([*above, source]).rstrip(".")
            submodules = {f"{source}.{alias.name}" for alias in node.names} & SOURCES.keys()
            found |= submodules or {source}
    return {name for name in found if name.split(".")[0] in PACKAGES} - {module}


GRAPH = {module: imported(module) for module in SOURCES}
LOOP = {module: found for module, found in GRAPH.items() if module.split(".")[0] == "fedalt"}


def part(module: str) -> str:
    """The design's name for a module: the first one below its package."""
    return module.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("module", [m for m in GRAPH if m.split(".")[0] == "fedalt_kernels"])
def test_kernels_follow_their_arrows(module: str) -> None:
    short = module.partition(".")[2]
    if short.startswith("triton"):
        shared = ("primitives", "quantized", "signals", "strips", "tiles", "workspace")
        allowed = {f"triton.{name}" for name in shared}
    else:
        allowed = KERNELS[short]
    assert GRAPH[module] <= {f"fedalt_kernels.{name}" for name in allowed}


def test_only_models_states_and_quantized_use_the_kernels_and_only_their_public_names() -> None:
    users = {m for m, found in LOOP.items() if any(f.startswith("fedalt_kernels") for f in found)}
    assert users == {"fedalt.models", "fedalt.quantized", "fedalt.states"}
    for user in users:
        for node in ast.walk(ast.parse(SOURCES[user].read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "fedalt_kernels"
            ):
                assert node.module == "fedalt_kernels"
                assert {alias.name for alias in node.names} <= set(fedalt_kernels.__all__)


def test_servers_mathematics_imports_nothing_of_the_loop() -> None:
    for module in ("server", "robust", "products"):
        assert not GRAPH[f"fedalt.{module}"]


def test_methods_know_neither_clients_nor_disks() -> None:
    allowed = {"errors", "method", "methods", "products", "rivals", "robust", "server", "states"}
    for module in ("method", "methods", "rivals"):
        assert {part(name) for name in GRAPH[f"fedalt.{module}"]} <= allowed


def test_client_server_and_evaluate_are_strangers() -> None:
    for module, found in LOOP.items():
        if part(module) in STRANGERS:
            assert not {part(name) for name in found} & (STRANGERS - {part(module)}), module


def test_commands_are_imported_only_from_above() -> None:
    for module, found in LOOP.items():
        name = part(module)
        height = COMMANDS.index(name) if name in COMMANDS else len(COMMANDS)
        if name:
            assert not {part(other) for other in found} & set(COMMANDS[:height]), module


def test_config_stands_at_the_bottom() -> None:
    assert GRAPH["fedalt.config"] <= {"fedalt.config_data", "fedalt.errors"}
    assert GRAPH["fedalt.config_data"] <= {"fedalt.errors"}


def test_no_cycles() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in GRAPH.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())
