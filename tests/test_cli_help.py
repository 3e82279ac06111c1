"""What the command says of itself, and the streams that it says it on."""

import argparse
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest

import fedalt
from fedalt.cli import _parser, main
from fedalt.config import DataConfig
from tests.conftest import write_client
from tests.run.test_run import quick
from tests.test_cli import refused


def test_alone_it_prints_its_help(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: fedalt [-h] [--version] COMMAND")


def subcommands():
    """Each ``fedalt COMMAND`` by name, with its parser."""
    actions = _parser()._actions
    (commands,) = [a.choices for a in actions if isinstance(a, argparse._SubParsersAction)]
    return commands


def test_every_help_ends_in_examples_that_parse():
    assert len(subcommands()) == 10
    for parser in (_parser(), *subcommands().values()):
        lines = parser.format_help().partition("\nexamples:\n")[2].splitlines()
        ours = [shlex.split(line, comments=True) for line in lines if "  fedalt " in line]
        assert 1 <= len(ours) <= len(lines) <= 3
        for words in ours:
            assert words[0] == "fedalt"
            if parser.prog != "fedalt":
                assert words[1] == parser.prog.split()[1]
            _parser().parse_args(words[1:])


def test_the_version_has_those_of_what_it_computes_with(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"fedalt {fedalt.__version__} (Python {platform.python_version()}, ")
    assert f"torch {importlib.metadata.version('torch')}" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("command", ["run", "compare", "memory"])
def test_a_ready_config_goes_by_its_name(command, capsys):
    message = refused([command, "llama2-7b-flan", "-c", "train.epochs=0"], capsys)
    assert message == "fedalt: llama2-7b-flan: train.epochs must be at least 1, got 0"
    message = refused([command, "llama-flan"], capsys)
    assert "did you mean llama2-7b-flan? known: bloom-560m-flan, commonsense, digits" in message


def test_settings_are_listed(capsys):
    assert main(["settings", "train.max_steps"]) == 0
    assert "train.max_steps (int | null, default 30)" in capsys.readouterr().out
    assert main(["settings", "--markdown"]) == 0
    assert "**`train.max_steps`** (`int | null`, default `30`)" in capsys.readouterr().out
    assert "did you mean train.max_steps?" in refused(["settings", "train.maxsteps"], capsys)


def command_line(*arguments, **settings):
    """A process of its own, with streams of its own."""
    return subprocess.run([sys.executable, "-m", "fedalt", *map(str, arguments)], **settings)


def test_what_a_stream_cannot_print_is_replaced(tiny_config, tmp_path):
    """Folder names in Unicode where file names and output are ASCII; the run is the same run."""
    data = tmp_path / "données"
    for client in ("日本", "žluť"):
        write_client(data / client, "a", 4)
    config = replace(quick(tiny_config, rounds=1), data=DataConfig(path=str(data)))
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    out = tmp_path / "été"
    run = ("run", path, "--data", data, "--out", out)
    done = command_line(*run, env=ascii_only, capture_output=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.decode("ascii")
    assert printed.count("\n| ?") == 2
    first, second, *_ = done.stderr.decode("ascii").splitlines()
    assert first.startswith("2 clients, 1 round of 2 steps, fedalt, on cpu -> ")
    assert second.startswith("round 0/1")
    for command in ((*run, "--resume"), ("evaluate", out)):
        done = command_line(*command, env=ascii_only, capture_output=True)
        assert done.returncode == 0, done.stderr
    refused = command_line("evaluate", out, "--client", "é", env=ascii_only, capture_output=True)
    assert refused.returncode == 2
    assert refused.stderr.isascii()
    assert refused.stderr.count(b"\n") == 1

    fedalt.Federation(replace(config, out=str(tmp_path / "unicode"))).run()
    saved = "checkpoints/round-0001/clients/日本.safetensors"
    assert (out / saved).read_bytes() == (tmp_path / "unicode" / saved).read_bytes()


@pytest.fixture
def nobody():
    """The write end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def test_a_reader_that_has_gone_is_not_told(tiny_config, config_file, nobody):
    """Not a word, and the status that a shell gives for SIGPIPE."""
    fedalt.Federation(quick(tiny_config, rounds=1)).run()
    out = tiny_config.out
    for command, unbuffered in (
        (("run", "--out", out, "--resume"), "1"),
        (("evaluate", out), "1"),
        (("report", out), ""),
        (("--help",), ""),
    ):
        env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = command_line(*command, stdout=nobody, stderr=subprocess.PIPE, env=env)
        assert (done.returncode, done.stderr) == (141, b""), command
    new = ("run", config_file, "--out", f"{out}-new")
    for command in (new, ("report", "nowhere")):  # progress, or an error
        done = command_line(*command, stdout=subprocess.PIPE, stderr=nobody)
        assert (done.returncode, done.stdout) == (141, b""), command


def test_streams_that_are_closed_or_full_end_nothing_else():
    shell = f"{shlex.quote(sys.executable)} -m fedalt settings train"
    for ending, status in ((">&-", 0), (">&- 2>&-", 0), (">/dev/full", 2)):
        done = subprocess.run(["sh", "-c", f"{shell} {ending}"], capture_output=True)
        assert done.returncode == status
        full = b"fedalt: No space left on device\n"
        assert done.stderr == (full if status else b"")
