"""Records that are too long are cut: and the run says so: once, and whose."""

import json
import warnings

import pytest

import fedalt
from fedalt.cli import main
from fedalt.run.cuts import Cuts
from tests.conftest import write_client
from tests.run.test_run import quick


@pytest.fixture
def long_ones(tiny_data):
    """Ann's second record is too long, and two of three that test Bob."""
    for part, places in (("ann/train", (1,)), ("bob/test", (0, 2))):
        path = tiny_data / f"{part}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for place in places:
            rows[place]["output"] = "long " * 150
        path.write_text("\n".join(map(json.dumps, rows)))
    return "records of more than 512 tokens are cut: 1 of 13 of ann, 2 of 9 of bob; raise it"


def test_a_run_tells_once_whose_records_are_cut(long_ones, tiny_config, tiny_data, capsys):
    config = quick(tiny_config)
    with pytest.warns(fedalt.InputWarning) as told:
        fedalt.Federation(config).run()
    assert [
        str(warning.message) for warning in told if warning.category is fedalt.InputWarning
    ] == [f"data.max_length: {long_ones} to keep them whole"]
    capsys.readouterr()
    assert main(["evaluate", config.out]) == 0
    assert capsys.readouterr().err == f"fedalt: data.max_length: {long_ones} to keep them whole\n"
    write_client(tiny_data.parent / "more" / "eve", "e" * 600, 2)
    assert main(["join", config.out, "--data", str(tiny_data.parent / "more")]) == 0
    assert "are cut: 5 of 5 of eve; raise it" in capsys.readouterr().err


def test_a_run_of_whole_records_tells_nothing(tiny_config):
    with warnings.catch_warnings():
        warnings.simplefilter("error", fedalt.InputWarning)
        fedalt.Federation(quick(tiny_config)).run()


def test_of_many_clients_some_are_named():
    cuts = Cuts(64)
    for number in range(7):
        cuts.note(f"c{number}", number, 9)
    for _ in range(2):
        cuts.note("c3", 1, 1)
    with pytest.warns(
        fedalt.InputWarning, match=r"64 tokens .* 5 of 9 of c5, and of 1 more client;"
    ):
        cuts.tell()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuts.tell()
