"""Opening `datasets` sources: every kind of file, splits, and what cannot be opened."""

import json
import sys

import pytest

from fedalt.data.sources import open_dataset
from fedalt.errors import InputError

datasets = pytest.importorskip("datasets")

ROWS = [{"question": f"q{i}", "answer": f"a{i}", "extra": i} for i in range(60)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(kind, folder):
    """The rows in a file or folder of this kind; its path."""
    whole = datasets.Dataset.from_list(ROWS)
    folder.mkdir()
    path = folder / f"rows.{kind}"
    if kind in ("jsonl", "csv", "parquet"):
        {"jsonl": whole.to_json, "csv": whole.to_csv, "parquet": whole.to_parquet}[kind](path)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "saved":
        whole.save_to_disk(str(path))
    elif kind == "arrow":
        whole.save_to_disk(str(folder / "saved"))
        next((folder / "saved").glob("*.arrow")).rename(path)
    elif kind == "saved splits":
        parts = {"train": whole.select(range(30)), "extra": whole.select(range(30, 60))}
        datasets.DatasetDict(parts).save_to_disk(str(path))
    else:
        for half in (0, 1):
            part = whole.select(range(30 * half, 30 * half + 30))
            part.to_parquet(folder / f"part-{half}.parquet")
        return folder / "*.parquet" if kind == "pattern" else folder
    return path


@pytest.mark.parametrize(
    "kind",
    ["jsonl", "json", "csv", "parquet", "arrow", "saved", "saved splits", "folder", "pattern"],
)
def test_every_kind_of_file_gives_all_rows(kind, tmp_path, capfd):
    path = write(kind, tmp_path / "data")
    capfd.readouterr()
    splits = ("train", "extra") if kind == "saved splits" else ("train",)
    assert open_dataset(str(path), splits).to_list() == ROWS
    assert capfd.readouterr().err == ""


def test_splits_are_joined_in_the_order_given(tmp_path):
    path = str(write("saved splits", tmp_path / "data"))
    assert open_dataset(path, ("extra", "train")).to_list() == ROWS[30:] + ROWS[:30]
    assert open_dataset(path, ("extra",)).to_list() == ROWS[30:]
    with pytest.raises(InputError, match=r"rows.saved splits: no split 'dev'; known: train, extra"):
        open_dataset(path, ("train", "dev"))


def test_a_file_that_has_changed_is_read_anew(tmp_path):
    path = write("jsonl", tmp_path / "data")
    assert len(open_dataset(str(path), ("train",))) == 60
    path.write_text(json.dumps(ROWS[0]) + "\n")
    assert len(open_dataset(str(path), ("train",))) == 1


def test_a_folder_of_several_configs_wants_one_named(tmp_path):
    folder = tmp_path / "suite"
    header = "---\nconfigs:\n"
    for number, name in enumerate(("big", "small")):
        (folder / name).mkdir(parents=True)
        (folder / name / "rows.jsonl").write_text(json.dumps(ROWS[number]))
        header += f"- config_name: {name}\n  data_files: {name}/rows.jsonl\n"
    (folder / "README.md").write_text(f"{header}---\n")
    assert open_dataset(f"{folder}:small", ("train",)).to_list() == [ROWS[1]]
    with pytest.raises(InputError, match=r"suite: datasets cannot .* \['big', 'small'\]"):
        open_dataset(str(folder), ("train",))


BROKEN = {
    "notes.txt": (b"hello", "wants files of one kind of .jsonl, .json, .csv"),
    "broken.jsonl": (b'{"a": 1}\n{"a"', "datasets cannot read it: "),
    "broken.csv": (b'a,b\n1,2\n"3\n', "datasets cannot read it: .*row 2"),
    "broken.parquet": (b"nothing", "datasets cannot read it: "),
    "void.jsonl": (b"", "empty; a dataset needs records"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_told_in_one_line(name, tmp_path, capfd):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: {message}") as caught:
        open_dataset(str(tmp_path / name), ("train",))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_files_of_two_kinds_are_refused(tmp_path):
    write("csv", tmp_path / "data")
    (tmp_path / "data" / "more.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(InputError, match=r"\*: wants files of one kind"):
        open_dataset(str(tmp_path / "data" / "*"), ("train",))


def test_what_is_not_there_is_told_in_one_line(tmp_path, capfd):
    absent = tmp_path / "nowhere"
    with pytest.raises(InputError, match=r"nowhere: no such folder or file, and no hub id") as path:
        open_dataset(str(absent), ("train",))
    with pytest.raises(InputError, match=r"owner/name:x: no such .* hub cannot be reached") as name:
        open_dataset("owner/name:x", ("train",))
    assert not any("\n" in str(caught.value) for caught in (path, name))


def test_without_the_library_the_cure_is_named(tmp_path, monkeypatch):
    path = write("jsonl", tmp_path / "data")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"rows.jsonl wants datasets: pip install"):
        open_dataset(str(path), ("train",))
    with pytest.raises(InputError, match=r"data/x: no such folder .* wants datasets: pip"):
        open_dataset("data/x", ("train",))
