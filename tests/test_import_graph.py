"""Who may import whom: rooms and floors of the loop, arrows of the kernels."""

import ast

import pytest

import fedalt_kernels
from scripts import house

# Every arrow of the kernels; a module of Triton kernels may import only its own shared parts.
KERNELS = {
    "": {"api", "fp8", "grouped_api", "grouped_layer", "layer", "quantized", "segments"},
    "adapter": set(),
    "dropout": set(),
    "quantized": set(),
    "fp8": {"quantized"},
    "segments": set(),
    "reference": {"adapter", "dropout", "segments"},
    "merged": {"adapter", "dropout", "quantized"},
    "weights": {"quantized", "triton.dequantize"},
    "plans": set(),
    "fused_forward": {
        "adapter",
        "quantized",
        "weights",
        "triton",
        "triton.contract",
        "triton.decode",
        "triton.forward",
        "triton.hopper",
        "triton.overlapped",
        "triton.pack",
        "triton.tiles",
    },
    "fused_backward": {
        "adapter",
        "fused_forward",
        "quantized",
        "weights",
        "triton",
        "triton.backward",
        "triton.contract",
        "triton.dropout",
        "triton.hopper",
        "triton.overlapped_backward",
        "triton.pack",
        "triton.reduce",
        "triton.tiles",
    },
    "fused": {
        "adapter",
        "fused_backward",
        "fused_forward",
        "plans",
        "quantized",
        "weights",
        "triton",
        "triton.tiles",
    },
    "kinds": {"adapter", "checks", "choice", "dropout", "plans", "quantized"},
    "operators": {"adapter", "fused", "merged", "quantized"},
    "autograd": {
        "adapter",
        "choice",
        "dispatch",
        "dropout",
        "operators",
        "quantized",
        "reference",
    },
    "choice": {"quantized", "triton", "triton.workspace"},
    "dispatch": set(),
    "checks": {"adapter", "dropout", "quantized"},
    "api": {
        "adapter",
        "autograd",
        "checks",
        "choice",
        "dropout",
        "kinds",
        "quantized",
        "reference",
    },
    "grouped": {"adapter", "merged", "quantized", "segments"},
    "grouped_fused": {
        "adapter",
        "fused",
        "fused_backward",
        "fused_forward",
        "plans",
        "quantized",
        "segments",
        "weights",
        "triton.clients",
        "triton.grouped",
        "triton.grouped_backward",
        "triton.grouped_decode",
        "triton.tiles",
    },
    "grouped_operators": {
        "adapter",
        "grouped",
        "grouped_fused",
        "operators",
        "quantized",
        "segments",
    },
    "grouped_autograd": {
        "adapter",
        "autograd",
        "dispatch",
        "grouped_operators",
        "quantized",
        "segments",
    },
    "grouped_api": {
        "adapter",
        "api",
        "checks",
        "choice",
        "dropout",
        "grouped_autograd",
        "kinds",
        "quantized",
        "reference",
        "segments",
    },
    "sharing": {"adapter", "choice", "dispatch", "dropout", "fused", "plans"},
    "base": {"checks", "quantized"},
    "layer": {"adapter", "api", "base", "checks", "quantized", "sharing"},
    "grouped_layer": {"adapter", "base", "checks", "grouped_api", "layer", "segments"},
}
# Of Hopper's own kernels, beside the shared parts that their plans and packing use.
HOPPER = {
    "blocks": set(),
    "ring": {"blocks"},
    "gates": set(),
    "shapes": set(),
    "order": {"shapes"},
    "makers": {"blocks", "gates", "ring"},
    "sums": {"blocks", "gates", "ring"},
    "forward": {"blocks", "makers", "ring"},
    "backward": {"blocks", "makers", "ring", "sums"},
    "pack": {"shapes"},
    "record": set(),
    "planning": {"backward", "forward", "order", "pack", "record", "shapes"},
    "": {"planning"},
}
# Users call the front; the back computes, and knows nothing of the front.
FRONT = {
    "",
    "api",
    "autograd",
    "base",
    "checks",
    "choice",
    "grouped_api",
    "grouped_autograd",
    "grouped_layer",
    "grouped_operators",
    "kinds",
    "layer",
    "operators",
    "sharing",
}


def test_every_room_has_its_floor_and_a_door_that_says_what_it_is_for() -> None:
    assert set(house.rooms()) < set(house.FLOOR)
    for room in house.rooms():
        door = ast.parse(house.SOURCES[f"fedalt.{room}"].read_text(encoding="utf-8"))
        assert len((ast.get_docstring(door) or "").splitlines()) == 1, room
        kinds = {type(node) for node in door.body[1:]}
        assert kinds <= {ast.Import, ast.ImportFrom, ast.Assign}, f"{room}: a door has no code"


def test_imports_run_down_from_floor_to_floor() -> None:
    assert house.running_up() == []


def test_no_import_goes_past_a_rooms_door() -> None:
    assert house.past_a_door() == []


def test_no_circles() -> None:
    assert house.circles() == []


def test_a_door_hands_on_only_what_another_room_or_a_user_takes() -> None:
    taken: dict[str, set[str]] = {name: set() for name in house.FLOOR}
    for module, found in house.GRAPH.items():
        for source, names in found.items():
            if source.startswith("fedalt.") and house.room(source) != house.room(module):
                taken[house.room(source)] |= names
    for room in house.rooms():
        assert set().union(*house.GRAPH[f"fedalt.{room}"].values()) == taken[room], room


def test_few_files_stand_outside_the_rooms() -> None:
    assert len([path for path in (house.ROOT / "fedalt").iterdir() if path.is_file()]) <= 5
    assert 10 <= len(house.rooms()) <= 12


def test_what_is_checked_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        "fedalt.store.journal": {"fedalt.run": {"Stage"}, "fedalt.model.states": {"State"}},
        "fedalt.run": {"fedalt.store.journal": {"Journal"}},
    }
    monkeypatch.setattr(house, "GRAPH", wrong)
    assert house.running_up() == ["store -> run"]
    assert house.past_a_door() == [
        "fedalt.store.journal -> fedalt.model.states",
        "fedalt.run -> fedalt.store.journal",
    ]
    assert house.circles() == ["fedalt.store.journal -> fedalt.run -> fedalt.store.journal"]


@pytest.mark.parametrize("module", [m for m in house.GRAPH if m.startswith("fedalt_kernels")])
def test_kernels_follow_their_arrows(module: str) -> None:
    short = module.partition(".")[2]
    shared = (
        "clients",
        "dropout",
        "launch",
        "pack",
        "primitives",
        "quantized",
        "reduce",
        "signals",
        "strips",
        "sums",
        "tiles",
    )
    if short.startswith("triton.hopper"):
        mine = short.removeprefix("triton.hopper").lstrip(".")
        allowed = {f"triton.hopper.{name}" for name in HOPPER[mine]} | {"triton.hopper"}
        if mine in ("pack", "planning", "record"):
            allowed |= {f"triton.{name}" for name in (*shared, "workspace")}
            allowed |= {"adapter"}
    elif short.startswith("triton"):
        allowed = {f"triton.{name}" for name in (*shared, "workspace")} | {"adapter", "plans"}
    else:
        allowed = KERNELS[short]
    assert set(house.GRAPH[module]) <= {f"fedalt_kernels.{name}" for name in allowed}


def test_the_kernels_back_knows_nothing_of_their_front() -> None:
    for short, found in KERNELS.items():
        assert short in FRONT or not found & FRONT, short


def test_only_the_model_uses_the_kernels_and_only_their_public_names() -> None:
    for module, found in house.GRAPH.items():
        for source, names in found.items():
            if module.split(".")[0] == "fedalt" and source.split(".")[0] == "fedalt_kernels":
                assert house.room(module) == "model" or names == {"__version__"}, module
                assert source == "fedalt_kernels"
                assert names <= set(fedalt_kernels.__all__)


def test_servers_mathematics_imports_nothing_of_the_loop() -> None:
    for module in ("server", "robust", "products"):
        assert not house.GRAPH[f"fedalt.methods.{module}"]
