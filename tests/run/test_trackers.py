"""What trackers show of a run, read back from where they keep it offline."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import fedalt
from fedalt.errors import InputError
from fedalt.report import points_of, trackers
from fedalt.store import Draft

RUNS = {"federation", "client-ann", "client-bob", "client-cyd"}


@pytest.fixture
def config(tiny_config):
    return replace(tiny_config, report_to=("tensorboard",))


@pytest.fixture
def cut(monkeypatch):
    """A run is cut short in its second round, when all but the checkpoint has been done."""

    def commit(draft, *args, **kwargs):
        if draft._number == 2:
            raise KeyboardInterrupt
        return whole(draft, *args, **kwargs)

    whole = Draft.commit
    monkeypatch.setattr(Draft, "commit", commit)
    return lambda: monkeypatch.setattr(Draft, "commit", whole)


def expected(out):
    """By run, tag and round: what the journal wrote, and its means and sums, by hand."""
    values = {}
    for line in (Path(out) / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        for name in ("loss", "sent", "rouge1"):
            if name in event and event["event"] in ("train", "evaluate", "traffic"):
                key = {"train": "train", "evaluate": "test", "traffic": "traffic"}[event["event"]]
                row = values.setdefault((f"{key}/{name}", event["round"]), {})
                row[event["client"]] = event[name]
    return values


def agrees(shown, out):
    """``shown``: by run and tag, the pairs of round and value; each exactly once."""
    assert set(shown) == RUNS
    for (tag, number), clients in expected(out).items():
        assert len(clients) == 3
        whole = sum(clients.values()) / (1 if tag.startswith("traffic") else 3)
        for name, value in {**clients, "": whole}.items():
            run = f"client-{name}" if name else "federation"
            got = [v for n, v in shown[run][tag] if n == number]
            assert got == [pytest.approx(value, rel=1e-6)], (run, tag, number)
    for run, tags in shown.items():
        assert [number for number, _ in sorted(tags["seconds/evaluate"])] == [0, 1, 2], run
    steps = shown["federation"]["seconds/train"]
    parts = [dict(shown[f"client-{name}"]["seconds/train"]) for name in ("ann", "bob", "cyd")]
    for number, value in steps:
        assert value == pytest.approx(sum(part[number] for part in parts), rel=1e-5)


def tensorboard(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = {}
    for folder in (Path(out) / "tensorboard").iterdir():
        events = EventAccumulator(str(folder))
        events.Reload()
        tags = events.Tags()["scalars"]
        shown[folder.name] = {t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags}
    return shown


def test_tensorboard_shows_every_round_once_cut_or_not(config, cut):
    pytest.importorskip("tensorboard")
    with pytest.raises(KeyboardInterrupt):
        fedalt.Federation(config).run()
    assert {n for n, _ in tensorboard(config.out)["federation"]["test/rouge1"]} == {0, 1}
    cut()
    fedalt.Federation(config).run(resume=True)
    agrees(tensorboard(config.out), config.out)


def test_a_round_that_was_half_told_is_shown_once(config):
    pytest.importorskip("tensorboard")
    fedalt.Federation(config).run()
    path = Path(config.out) / "trackers.json"
    record = json.loads(path.read_text())
    assert record["tensorboard"]["told"] == 2
    record["tensorboard"]["told"] = 0  # as of a kill before it was written
    path.write_text(json.dumps(record))
    fedalt.Federation(config).run(resume=True)
    agrees(tensorboard(config.out), config.out)


def test_a_tracker_added_to_a_finished_run_is_told_all_of_it(config):
    pytest.importorskip("tensorboard")
    fedalt.Federation(replace(config, report_to=())).run()
    assert not (Path(config.out) / "trackers.json").exists()
    fedalt.Federation(config).run(resume=True)
    agrees(tensorboard(config.out), config.out)


def test_a_tracker_changes_nothing_of_a_run_and_its_failure_does_not_end_it(
    config, monkeypatch, capsys, tmp_path
):
    """It fails in the first round, is told nothing more, and is told all by a resume."""
    told = []

    class Broken(trackers.TensorBoard):
        def log(self, name, values, number):
            told.append((name, number))
            if number == 1:
                raise OSError("no room\nsecond line")

        def close(self, failed):
            raise AssertionError("closed")

    apart = replace(config, out=str(tmp_path / "apart"), report_to=())
    fedalt.Federation(apart).run()
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Broken)
    fedalt.Federation(config).run()
    lines = [line for line in capsys.readouterr().err.splitlines() if "tensorboard" in line]
    assert lines == ["tensorboard is told nothing more, --resume makes up for it: OSError: no room"]
    assert {number for _, number in told} == {0, 1}
    assert len(told) == 5
    for name in ("metrics.jsonl", "results.json"):
        one, other = (Path(c.out) / name for c in (config, apart))
        assert one.read_bytes() == other.read_bytes()
    assert json.loads((Path(config.out) / "trackers.json").read_text())["tensorboard"]["told"] == 0


def test_a_tracker_that_cannot_be_closed_does_not_end_a_run(config, monkeypatch, capsys):
    class Broken(trackers.TensorBoard):
        def close(self, failed):
            raise OSError("no room")

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Broken)
    fedalt.Federation(config).run()
    assert "tensorboard could not be closed: OSError: no room" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("tensorboard", "torch.utils.tensorboard", "tensorboard"),
        ("wandb", "wandb", "wandb"),
        ("mlflow", "mlflow", "mlflow"),
    ],
)
def test_a_missing_package_is_told_before_anything_is_written(
    name, module, extra, tiny_config, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"report_to wants .*: pip install 'fedalt\[{extra}\]'"):
        fedalt.Federation(replace(tiny_config, report_to=(name,))).run()
    assert not Path(tiny_config.out).exists()


def test_a_tracker_that_is_not_known_is_told(tiny_config):
    with pytest.raises(InputError, match="report_to must be one of tensorboard, wandb, mlflow"):
        replace(tiny_config, report_to=("comet",))


def test_a_damaged_record_is_told(config):
    Path(config.out).mkdir()
    (Path(config.out) / "config.yaml").write_text(config.to_yaml())
    (Path(config.out) / "trackers.json").write_text('{"tensorboard": {"shown": 1}}')
    with pytest.raises(InputError, match=r"trackers\.json: is not what a run wrote; remove it"):
        fedalt.Federation(config).run(resume=True)


def test_clients_out_of_the_federation_are_not_in_its_means(tmp_path):
    events = [
        {"event": "evaluate", "round": 1, "client": "ann", "rouge1": 10.0},
        {"event": "evaluate", "round": 1, "client": "bob", "rouge1": 30.0},
        {"event": "fail", "round": 1, "client": "cyd", "reason": "broken", "unseen": True},
        {"event": "thin", "round": 1, "client": "", "reason": "1 good update"},
        {"event": "evaluate", "round": 2, "client": "ann", "rouge1": 50.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    assert points_of(tmp_path, 1, 1) == {
        1: {
            "client-ann": {"test/rouge1": 10.0},
            "client-bob": {"test/rouge1": 30.0},
            "federation": {"test/rouge1": 20.0},
        }
    }


def test_mlflow_nests_clients_under_the_federation(tiny_config, cut, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    config = replace(tiny_config, report_to=("mlflow",))
    with pytest.raises(KeyboardInterrupt):
        fedalt.Federation(config).run()
    client = MlflowClient()
    (experiment,) = (e for e in client.search_experiments() if e.name == "fedalt")
    assert {r.info.status for r in client.search_runs([experiment.experiment_id])} == {"FAILED"}
    cut()
    path = Path(config.out) / "trackers.json"
    record = json.loads(path.read_text())
    record["mlflow"]["told"] = 0  # round 1 has been told all the same
    path.write_text(json.dumps(record))
    fedalt.Federation(config).run(resume=True)
    runs = client.search_runs([experiment.experiment_id])
    shown = {}
    for run in runs:
        history = {t: client.get_metric_history(run.info.run_id, t) for t in run.data.metrics}
        name = run.info.run_name.removeprefix("run/")
        shown[name] = {t: [(m.step, m.value) for m in rows] for t, rows in history.items()}
    agrees(shown, config.out)
    (top,) = (run for run in runs if run.info.run_name == "run/federation")
    above = {r.data.tags.get("mlflow.parentRunId") for r in runs if r is not top}
    assert above == {top.info.run_id}
    assert top.data.params["lora.rank"] == "2"
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_wandb_groups_clients_with_the_federation(tiny_config, cut, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = replace(tiny_config, report_to=("wandb",))
    with pytest.raises(KeyboardInterrupt):
        fedalt.Federation(config).run()
    cut()
    fedalt.Federation(config).run(resume=True)
    shown, groups, ids = wandb_files(Path(config.out) / "wandb")
    agrees(shown, config.out)
    assert len(groups) == 1
    assert ids == json.loads((Path(config.out) / "trackers.json").read_text())["wandb"]["runs"]


def wandb_files(folder):
    """What the files of offline runs have: by run and tag, rounds and values; groups; ids."""
    from wandb.proto import wandb_internal_pb2

    shown, groups, ids = {}, set(), {}
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        for raw in records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(raw)
            if record.WhichOneof("record_type") == "run":
                name = record.run.display_name.removeprefix("run/")
                groups.add(record.run.run_group)
                assert ids.setdefault(name, record.run.run_id) == record.run.run_id
            elif record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                for tag, value in row.items():
                    shown.setdefault(name, {}).setdefault(tag, []).append((row["_step"], value))
    return shown, groups, ids


def records(content):
    """The records of a log in LevelDB's format, after the 7 bytes that say whose it is."""
    place, block, whole = 7, 2**15, b""
    while place + 7 <= len(content):
        if block - place % block < 7:
            place += block - place % block
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""
