"""The command: exit status, one line for bad input, nothing written or lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

import fedalt
from fedalt.cli import main
from fedalt.errors import InputError, RunFailed
from fedalt.run.comparison import compare
from fedalt.store.rundir import sole_writer
from tests.conftest import write_client
from tests.run.test_run import quick


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def refused(arguments, capsys) -> str:
    """The one line that a refused command prints; its exit status is 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("fedalt: ")]
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert len(lines) == 1
    return lines[0]


def break_data(root: Path, name: str, content: bytes) -> None:
    (root / "bob" / name).write_bytes(content)


BAD_DATA = {
    "empty train": (lambda r: break_data(r, "train.jsonl", b""), "bob/train.jsonl: empty"),
    "broken JSON": (
        lambda r: break_data(r, "train.jsonl", b'{"instruction":\n'),
        "bob/train.jsonl:1: broken JSON",
    ),
    "no output": (
        lambda r: break_data(r, "test.jsonl", b'{"instruction": "a"}\n'),
        "bob/test.jsonl:1: field 'output' is missing",
    ),
    "encoding": (
        lambda r: break_data(r, "train.jsonl", b'{"instruction": "\xe9"}\n'),
        "bob/train.jsonl:1: not UTF-8 (byte 0xe9 at column 18)",
    ),
    "missing folder": (shutil.rmtree, "no such folder"),
    "missing file": (
        lambda r: (r / "bob" / "test.jsonl").unlink(),
        "bob/test.jsonl: missing",
    ),
    "twice": (
        lambda r: os.symlink(r / "bob", r / "zoe"),
        "zoe: the same client as",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
@pytest.mark.parametrize("command", ["run", "compare"])
def test_bad_data_is_refused_before_anything_is_written(
    case, command, config_file, tiny_data, tiny_config, tmp_path, capsys
):
    spoil, message = BAD_DATA[case]
    spoil(tiny_data)
    before = tree(tmp_path)
    assert message in refused([command, config_file], capsys)
    assert tree(tmp_path) == before
    assert not Path(tiny_config.out).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", "lora.rank=0"], "lora.rank must be at least 1, got 0"),
        (["-c", "lora.target_modules=[q_porj]"], "'q_porj'; did you mean q_proj"),
        (["-c", "lora.target_modules=q_proj"], "a list takes endings: [q_proj]"),
        (["-c", "train.batchsize=1"], "did you mean train.batch_size?"),
        (["-c", "data.clients=[bob, bob]"], "names the client 'bob' twice"),
        (["-c", "method=fedavg"], "no method is named 'fedavg'"),
        (["-c", "federation.away={zoe: [1]}"], "federation.away: no client 'zoe'"),
        (["-c", "federation.participation=0"], "federation.participation must be in (0, 1]"),
        (["-c", "train.batch_size"], "wants key.path=value"),
        (["-c", "lora=3"], "lora must be a group of settings"),
        (["-c", "model.path=no/such"], "model.path: cannot load 'no/such'"),
        (["--data", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    arguments, message, config_file, tiny_config, tmp_path, capsys
):
    before = tree(tmp_path)
    assert message in refused(["run", config_file, *arguments], capsys)
    assert tree(tmp_path) == before


def test_what_all_linear_leaves_out_is_told_in_one_line(config_file, tiny_base, tmp_path, capsys):
    folder = tmp_path / "mixture"
    shutil.copytree(tiny_base, folder)
    MixtralForCausalLM(
        MixtralConfig(
            vocab_size=259,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
        )
    ).save_pretrained(folder)
    settings = [f"model.path={folder}", "rounds=1", "train.max_steps=1"]
    words = [word for each in settings for word in ("-c", each)]
    assert main(["run", str(config_file), *words]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "all-linear" in line]
    assert len(told) == 1
    assert re.fullmatch(
        r"fedalt: lora.target_modules: all-linear leaves out \d\d\.\d % of the parameters, in "
        r"modules that take no adapter: model\.layers\.\*\.mlp\.experts",
        told[0],
    )


@pytest.mark.parametrize("command", ["run", "compare"])
def test_a_config_that_is_not_there_is_named(command, capsys):
    assert "no-such.yaml: cannot read the config" in refused([command, "no-such.yaml"], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "invalid choice: 'rnu'"),
        (["run", "a.yaml", "b.yaml"], "unrecognized arguments: b.yaml"),
        (["evaluate"], "the following arguments are required: RUN"),
        (["join", "runs/x"], "the following arguments are required: --data"),
        (["export", "runs/x", "bob"], "the following arguments are required: --to"),
        (["report", "runs/x", "--tensorbord"], "unrecognized arguments: --tensorbord"),
    ],
)
def test_a_line_that_is_no_command_is_told_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("fedalt: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert "--help" in errors


def test_an_output_directory_is_never_overwritten(config_file, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("years of work")
    before = tree(tmp_path)
    message = refused(["run", config_file, "--out", taken], capsys)
    assert "taken: not empty; add --resume" in message
    message = refused(["run", config_file, "--out", taken, "--resume"], capsys)
    assert "not empty and no run of fedalt" in message
    message = refused(["run", config_file, "--out", taken / "thesis.tex" / "run"], capsys)
    assert "thesis.tex is a file" in message
    assert tree(tmp_path) == before


def test_an_unwritable_output_directory_is_named(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "is not writable" in refused(["run", config_file, "--out", tmp_path / "run"], capsys)
    assert not (tmp_path / "run").exists()


def test_a_run_prints_its_table_and_resumes_only_under_its_own_config(
    config_file, tiny_config, capsys
):
    out = tiny_config.out
    config_file.write_text(quick(tiny_config).to_yaml())
    assert main(["run", str(config_file)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("| client")
    assert printed.splitlines()[-1] == f"report: {out}/report/report.html"
    assert Path(out, "report", "report.html").exists()

    before = tree(Path(out))
    message = refused(["run", config_file, "--resume", "-c", "train.batch_size=7"], capsys)
    assert "train.batch_size is 7 here and was 2" in message
    assert "not empty; add --resume" in refused(["run", config_file], capsys)
    assert tree(Path(out)) == before

    assert main(["run", "--out", out, "--resume"]) == 0  # the run's own config is enough
    assert capsys.readouterr().out == printed
    assert main(["report", out]) == 0
    assert capsys.readouterr().out == printed
    assert main(["evaluate", out, "--client", "bob"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]] == ["bob"]


def test_a_resume_needs_a_directory(capsys):
    assert "--resume wants the run directory" in refused(
        ["run", "-c", "rounds=1", "--resume"], capsys
    )


def test_a_resume_where_no_run_is_starts_none(tmp_path, capsys):
    message = refused(["run", "--out", tmp_path / "typo", "--resume"], capsys)
    assert message == f"fedalt: --resume: no run in {tmp_path / 'typo'}; name it with --out"
    assert not (tmp_path / "typo").exists()


COMMANDS = {
    "evaluate": (),
    "report": (),
    "join": ("--data", "zoe"),
    "export": ("bob", "--to", "adapter"),
    "serve": (),
}
"""What reads a run, with what else it must be told."""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_directory_without_a_run_is_named(command, tmp_path, capsys):
    arguments = [command, tmp_path, *COMMANDS[command]]
    assert f"{tmp_path}/config.yaml: cannot read" in refused(arguments, capsys)


@pytest.mark.parametrize("command", ["evaluate", "join", "export"])
def test_a_damaged_checkpoint_is_refused_by_every_command(
    command, tiny_config, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_client(tmp_path / "zoe", "z", 4)
    config = quick(tiny_config)
    fedalt.Federation(config).run()
    newest = Path(config.out, "checkpoints", "round-0002")
    (newest / "clients" / "bob.safetensors").write_bytes(b"")
    before = tree(tmp_path)
    for arguments in (
        [command, config.out, *COMMANDS[command]],
        ["run", "--out", config.out, "--resume"],
    ):
        message = refused(arguments, capsys)
        assert "clients/bob.safetensors: damaged" in message
        assert message.endswith(f"remove {newest} to go back to round-0001")
        assert tree(tmp_path) == before


def test_evaluate_refuses_what_it_does_not_find(tiny_config, tmp_path, capsys):
    config = quick(tiny_config, rounds=1)
    fedalt.Federation(config).run()
    evaluate = ["evaluate", config.out]
    assert "no client 'zoe' there" in refused([*evaluate, "--client", "zoe"], capsys)
    assert "nowhere: no such folder" in refused([*evaluate, "--data", "nowhere"], capsys)
    write_client(tmp_path / "other" / "zoe", "z", 4)
    message = refused([*evaluate, "--data", tmp_path / "other"], capsys)
    assert "no client 'zoe'; known: ann, bob, cyd" in message
    assert main(["evaluate", config.out, "--data", config.data.path]) == 0
    assert "bob" in capsys.readouterr().out


def test_clients_may_differ_in_their_metrics(tiny_config, tmp_path, capsys):
    """One with options is scored by a choice among them; the others have no such number."""
    row = {"instruction": "say", "output": "a", "options": ["a", "b"]}
    for part in ("train", "test"):
        path = Path(tiny_config.data.path) / "cyd" / f"{part}.jsonl"
        path.write_text((json.dumps(row) + "\n") * 4)
    config = quick(tiny_config, rounds=1)
    fedalt.Federation(config).run()
    assert main(["evaluate", config.out]) == 0
    header, _, *rows = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    choice = [name.strip() for name in header].index("choice")
    assert [row[choice].strip() == "-" for row in rows] == [True, True, False]


def test_whatever_else_the_disk_refuses_is_one_line_too(tiny_config, capsys, monkeypatch):
    """Of the commands that write outside a run."""
    config = quick(tiny_config, rounds=1)
    fedalt.Federation(config).run()

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device", "somewhere/report.html")

    monkeypatch.setattr("fedalt.cli.write_report", full)
    message = refused(["report", config.out], capsys)
    assert message == "fedalt: somewhere/report.html: No space left on device"


def test_without_out_runs_are_numbered(config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["run", str(config_file), "-c", "out=''", "-c", "rounds=1"]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["data-fedalt", "data-fedalt-2"]


def test_an_interrupt_exits_130_with_the_line_that_resumes(config_file, tiny_config):
    command = [sys.executable, "-m", "fedalt", "run", str(config_file), "-c", "rounds=500"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a background shell has its children ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not Path(tiny_config.out, "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    last = errors.splitlines()[-1]
    assert last == f"fedalt: interrupted; go on with: fedalt run --out {tiny_config.out} --resume"
    assert "Traceback" not in errors


def test_compare_prints_a_line_a_method_and_resumes(config_file, tiny_config, capsys):
    """What the tables hold is tested without runs, in ``test_compare``."""
    config_file.write_text(quick(tiny_config, rounds=1).to_yaml())
    arguments = ["compare", str(config_file), "--methods", "fedalt,local", "--seeds", "3"]
    assert main([*arguments, "--jobs", "2"]) == 0
    printed = capsys.readouterr().out
    first = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    assert {"method", "fedalt", "local"} <= set(first)
    out = Path(tiny_config.out)
    assert printed.splitlines()[-1] == f"report: {out}/compare.html"
    summary = json.loads((out / "compare.json").read_text())
    for method in ("fedalt", "local"):
        written = json.loads((out / method / "seed-3" / "results.json").read_text())
        assert summary["methods"][method][0]["mean"] == written["mean"]

    assert "not empty; add --resume" in refused(arguments, capsys)
    for jobs in ("2", "1"):  # the runs keep their threads
        assert main([*arguments, "--resume", "--jobs", jobs]) == 0
        assert capsys.readouterr().out == printed


def test_a_run_that_fails_ends_the_comparison_and_the_others(config_file, capsys):
    """A model that is not there is bad input; the run beside it is stopped."""
    arguments = ["compare", str(config_file), "--methods", "fedalt,local", "--jobs", "2"]
    message = refused([*arguments, "--seeds", "3", "-c", "model.path=no/such"], capsys)
    assert re.match(r"fedalt: (fedalt|local) seed 3: model.path: cannot load 'no/such'", message)


def test_a_failing_run_stops_the_one_beside_it(config_file, tiny_config, monkeypatch):
    """The first process fails at once, the second would take an hour."""
    started = []

    def start(job, root):
        code = "raise SystemExit('boom')" if not started else "import time; time.sleep(3600)"
        log = root / f"{job.config.method}-{job.config.seed}.log"
        with open(log, "wb") as file:
            process = subprocess.Popen([sys.executable, "-c", code], stderr=file)
        started.append(process)
        return process

    monkeypatch.setattr("fedalt.run.comparison._start", start)
    with pytest.raises(RunFailed, match=r"fedalt seed 0 failed: boom \(whole log: .*0.log\)"):
        compare(tiny_config, ["fedalt", "local"], [0], 2, False)
    assert started[1].returncode == -signal.SIGTERM


def test_two_processes_cannot_run_in_one_directory(tiny_config):
    config = quick(tiny_config, rounds=1)
    Path(config.out).mkdir()
    with sole_writer(Path(config.out)), pytest.raises(InputError, match="another process is run"):
        fedalt.Federation(config).run()
    fedalt.Federation(config).run()


def test_a_wrong_start_is_refused_before_anything_is_written(tiny_config):
    lora = replace(tiny_config.lora, client_starts={"bob": "nowhere"})
    with pytest.raises(InputError, match="nowhere"):
        fedalt.Federation(replace(tiny_config, lora=lora)).run()
    assert not Path(tiny_config.out).exists()


def test_compare_refuses_what_it_cannot_pair(config_file, capsys):
    base = ["compare", config_file]
    assert "--methods: names one twice" in refused([*base, "--methods", "local,local"], capsys)
    assert "--seeds: names one twice" in refused([*base, "--seeds", "1,1"], capsys)
    assert "--seeds: wants a whole number" in refused([*base, "--seeds", "1,x"], capsys)
    assert "--jobs must be at least 1" in refused([*base, "--jobs", "0"], capsys)
    assert "no method is named 'x'" in refused([*base, "--methods", "x"], capsys)
