"""The rooms of ``fedalt/``, their floors, and the imports between them.

``python scripts/house.py`` prints them and ends with status 1 where an import runs back up, past
another room's door, or in a circle. ``tests/test_import_graph.py`` holds the code to the same.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("fedalt", "fedalt_kernels")
FLOORS = (
    ("errors",),
    ("config", "report"),
    ("data", "model"),
    ("training", "methods", "store"),
    ("evaluation",),
    ("run",),
    ("memory", "serving", "flower"),
    ("cli",),
    ("fedalt", "__main__"),
)
"""From the ground up. A room imports from lower floors only; those of one floor are strangers."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for name in PACKAGES for path in (ROOT / name).rglob("*.py")}


def imported(module: str) -> dict[str, set[str]]:
    """By module of this project that a module imports from, functions included: the names."""
    found: dict[str, set[str]] = defaultdict(set)
    path = SOURCES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.name] |= set()
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parents = package.split(".")
                above = parents[: len(parents) - node.level + 1]
                source = ".".join([*above, source]).rstrip(".")
            for alias in node.names:
                if (inner := f"{source}.{alias.name}") in SOURCES:
                    found[inner] |= set()
                else:
                    found[source].add(alias.name)
    return {name: names for name, names in found.items() if name.split(".")[0] in PACKAGES}


GRAPH = {module: imported(module) for module in SOURCES}


def room(module: str) -> str:
    """The room that a module of ``fedalt`` is in: the first name below the package."""
    return module.partition(".")[2].partition(".")[0] or module


def between_rooms() -> dict[str, set[str]]:
    """By room (or door), the rooms that it imports from."""
    arrows: dict[str, set[str]] = defaultdict(set)
    for module, found in GRAPH.items():
        if module.split(".")[0] == "fedalt":
            others = {room(name) for name in found if name.split(".")[0] == "fedalt"}
            arrows[room(module)] |= others - {room(module)}
    return dict(arrows)


def rooms() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "fedalt").glob("*/__init__.py"))


def running_up() -> list[str]:
    """Imports that do not run down from floor to floor."""
    arrows = between_rooms()
    return [
        f"{upper} -> {lower}"
        for upper, found in sorted(arrows.items())
        for lower in sorted(found)
        if FLOOR[lower] >= FLOOR[upper]
    ]


def past_a_door() -> list[str]:
    """Imports of another room's inner file, whose names its door should hand on."""
    return [
        f"{module} -> {name}"
        for module, found in GRAPH.items()
        for name in found
        if name.count(".") > 1 and name.startswith("fedalt.") and room(name) != room(module)
    ]


def circles() -> list[str]:
    """Modules that import themselves by way of others; doors that hand names on do not count."""
    done: set[str] = set()
    found: list[str] = []

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            found.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for other in GRAPH.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())
    return found


def main() -> int:
    arrows = between_rooms()
    files = sorted(path.name for path in (ROOT / "fedalt").iterdir() if path.is_file())
    print(f"files directly in fedalt/: {len(files)} ({', '.join(files)})")
    print(f"rooms: {len(rooms())}, on {len(FLOORS)} floors with the doors, from the top:\n")
    for names in reversed(FLOORS):
        for name in names:
            print(f"  {name:10} imports {', '.join(sorted(arrows.get(name, ()))) or 'nothing'}")
    faults = {
        "running back up": running_up(),
        "past a door": past_a_door(),
        "in circles": circles(),
    }
    inner = sum(len(found) for name, found in arrows.items() if FLOOR[name] < FLOOR["fedalt"])
    print(f"\nimports between rooms: {inner}; {len(arrows['fedalt'])} more of the package's door")
    for kind, rows in faults.items():
        print(f"{kind}: {len(rows)}", *rows, sep="\n  " if rows else "")
    return 1 if any(faults.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
