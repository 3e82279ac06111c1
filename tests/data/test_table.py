"""`datasets` sources: opened from disk, cut into clients, read row by row as records."""

import json

import numpy as np
import pytest
from PIL import Image

from fedalt.config.schema import DataConfig, PartitionConfig
from fedalt.data import ImageRecord, Record, load_clients
from fedalt.errors import InputError

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

EQUAL = {"by": "equal", "clients": 3}
ROWS = [
    {"question": f"q{i}", "answer": f"a{i}", "task": f"t{i % 3}", "extra": i} for i in range(60)
]
COLUMNS = {"instruction": "question", "output": "answer"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def clients_of(path, partition=None, seed=0, **settings):
    source = {"sources": path} if isinstance(path, dict) else {"path": str(path)}
    data = DataConfig(**source, **{"columns": COLUMNS, **settings})
    return load_clients(data, PartitionConfig(**(partition or {})), seed)


def all_records(clients):
    return [
        record for client in clients for part in vars(client.read()).values() for record in part
    ]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_every_row_is_one_clients_record(rows):
    clients = clients_of(rows, EQUAL)
    assert [client.id for client in clients] == ["client-00", "client-01", "client-02"]
    assert all((len(c.read().train), len(c.read().test)) == (16, 4) for c in clients)
    records = all_records(clients)
    assert len(records) == 60
    assert set(records) == {Record(row["question"], row["answer"]) for row in ROWS}


def test_reads_and_cuts_follow_the_seed_alone(rows):
    first, again, other = (clients_of(rows, EQUAL, seed) for seed in (1, 1, 2))
    assert [c.read().fingerprint() for c in first] == [c.read().fingerprint() for c in again]
    assert first[0].read().train == first[0].read().train
    assert first[0].read().fingerprint() != other[0].read().fingerprint()


def test_a_client_for_each_value_of_a_column(rows):
    clients = clients_of(rows, {"by": "column", "column": "task"})
    assert [client.id for client in clients] == ["t0", "t1", "t2"]
    for number, client in enumerate(clients):
        records = all_records([client])
        assert {record.category for record in records} == {f"t{number}"}
        assert len(records) == 20
    chosen = clients_of(rows, {"by": "column", "column": "task"}, clients=("t2",))
    assert [client.id for client in chosen] == ["t2"]


def test_texts_keep_the_shares_of_their_categories(rows):
    columns = {**COLUMNS, "category": "task"}
    for client in clients_of(rows, {**EQUAL, "clients": 1}, columns=columns, test_share=0.25):
        tested = [record.category for record in client.read().test]
        assert [tested.count(f"t{i}") for i in range(3)] == [5, 5, 5]


def test_class_names_and_options_are_read(tmp_path):
    features = datasets.Features(
        {
            "instruction": datasets.Value("string"),
            "output": datasets.ClassLabel(names=["no", "yes"]),
            "options": datasets.List(datasets.Value("string")),
        }
    )
    some = [{"instruction": "ok?", "output": i % 2, "options": ["yes", "no"]} for i in range(20)]
    datasets.Dataset.from_list(some, features=features).save_to_disk(str(tmp_path / "d"))
    records = all_records(clients_of(tmp_path / "d", {**EQUAL, "clients": 2}, columns={}))
    assert {(record.output, record.options) for record in records} == {
        ("no", ("yes", "no")),
        ("yes", ("yes", "no")),
    }


def test_sources_are_a_client_each(rows, tmp_path):
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:5]))
    clients = clients_of({"short": str(short), "all": str(rows)})
    assert [client.id for client in clients] == ["all", "short"]
    assert [len(client.read().test) for client in clients] == [12, 1]
    with pytest.raises(InputError, match=r"data.sources: 'a b' cannot name .* try 'a-b'"):
        clients_of({"a b": str(rows)})
    with pytest.raises(InputError, match=r"partition.by: sources has its clients already"):
        clients_of({"all": str(rows)}, EQUAL)
    with pytest.raises(InputError, match=r"data.path must be left out where data.sources"):
        DataConfig(path="here", sources={"a": "b"})


@pytest.fixture
def pictures(tmp_path):
    """90 images of three fine labels and two coarse ones, with columns as CIFAR-100 names them."""
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(names=["apple", "bee", "cod"]),
            "coarse_label": datasets.ClassLabel(names=["plant", "animal"]),
        }
    )
    table = [
        {
            "img": Image.fromarray(np.full((4, 4, 3), i, np.uint8)),
            "fine_label": i % 3,
            "coarse_label": min(i % 3, 1),
        }
        for i in range(90)
    ]
    datasets.Dataset.from_list(table, features=features).save_to_disk(str(tmp_path / "pictures"))
    return tmp_path / "pictures"


def test_images_have_their_class_names(pictures):
    clients = clients_of(pictures, EQUAL, kind="image", columns={})
    records = all_records(clients)
    assert all(isinstance(record, ImageRecord) for record in records)
    assert {int(np.asarray(record.image)[0, 0, 0]) for record in records} == set(range(90))
    for record in records:
        value = int(np.asarray(record.image)[0, 0, 0])
        assert record.label == ["apple", "bee", "cod"][value % 3]
    first, again = (clients_of(pictures, EQUAL, kind="image", columns={})[0] for _ in range(2))
    assert first.read().fingerprint() == again.read().fingerprint()


def test_tests_are_drawn_like_the_clients_labels(pictures):
    cut = {"by": "dirichlet", "column": "fine_label", "alpha": 1.0, "clients": 3}
    for client in clients_of(pictures, cut, kind="image", columns={}):
        parts = client.read()
        for label in ("apple", "bee", "cod"):
            tested = sum(record.label == label for record in parts.test)
            held = tested + sum(record.label == label for record in parts.train)
            assert abs(tested - 0.2 * held) <= 1


def test_superclasses_by_column_and_by_mapping_cut_alike(pictures):
    above = {"apple": "plant", "bee": "animal", "cod": "animal"}
    cuts = [
        {"by": "dirichlet", "column": "coarse_label", "alpha": 2.0, "clients": 3},
        {"by": "dirichlet", "column": "fine_label", "superclasses": above, "alpha": 2.0},
    ]
    sizes = []
    for cut in cuts:
        clients = clients_of(pictures, {**cut, "clients": 3}, kind="image", columns={})
        labels = [[record.label for record in all_records([client])] for client in clients]
        sizes.append([(len(of_one), of_one.count("apple")) for of_one in labels])
    assert sizes[0] == sizes[1]
    assert [sum(column) for column in zip(*sizes[0], strict=True)] == [90, 30]


def test_images_in_class_folders_can_be_cut(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for i in range(15):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "tree" / name / f"{i}.png")
    cut = {"by": "pathological", "column": "label", "classes": 1, "clients": 2}
    clients = clients_of(tmp_path / "tree", cut, kind="image", columns={})
    labels = [{record.label for record in all_records([client])} for client in clients]
    assert sorted(map(sorted, labels)) == [["cat"], ["dog"]]


def test_suites_are_known_by_their_columns(tmp_path):
    row = {"goal": "dry a cup", "sol1": "towel", "sol2": "fish", "label": 0}
    (tmp_path / "piqa.jsonl").write_text((json.dumps(row) + "\n") * 20)
    for settings in ({}, {"format": "piqa"}):
        clients = clients_of(
            tmp_path / "piqa.jsonl", EQUAL | {"clients": 2}, columns={}, **settings
        )
        assert {(r.output, r.category) for r in all_records(clients)} == {("towel", "piqa")}


def test_a_suites_column_may_have_another_name(tmp_path):
    row = {"passage": "wood is solid", "question": "is wood solid", "idx": 1, "label": "True"}
    (tmp_path / "boolq.jsonl").write_text((json.dumps(row) + "\n") * 10)
    clients = clients_of(
        tmp_path / "boolq.jsonl", {"by": "equal", "clients": 1}, columns={"answer": "label"}
    )
    assert {record.output for record in all_records(clients)} == {"true"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"columns": {}},
            r"no column for 'instruction'; name it in data.columns, such as -c "
            r"'data.columns=\{instruction: NAME\}'; known: question, answer, task, extra",
        ),
        (
            {"columns": {"instruction": "question", "output": "reply"}},
            "data.columns.output: no column 'reply'; known: question, answer, task, extra",
        ),
        ({"columns": {**COLUMNS, "label": "task"}}, "records have no field 'label'; known: instr"),
        ({"format": "piqa", "columns": {}}, "no column for 'goal'"),
        ({"kind": "image", "columns": {}}, "no column for 'image'"),
        (
            {"kind": "image", "columns": {"image": "extra", "label": "task"}},
            "column 'extra' holds no images",
        ),
        ({"splits": ("train", "dev")}, "no split 'dev'; known: train"),
        ({"clients": ("client-09",)}, "no client 'client-09'; known: client-00"),
        (
            {"columns": {"instruction": "question", "output": "extra"}},
            "column 'extra' must be text",
        ),
    ],
)
def test_what_does_not_fit_is_named(rows, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        all_records(clients_of(rows, EQUAL, **settings))
    assert "\n" not in str(caught.value)


def test_a_bad_row_is_named(tmp_path):
    bad = [*ROWS[:7], {**ROWS[7], "answer": " "}, *ROWS[8:]]
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in bad))
    with pytest.raises(InputError, match=r"bad.jsonl: row 8: column 'answer' is empty"):
        all_records(clients_of(path, EQUAL))


def test_labels_that_are_hidden_or_missing_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "task": None}) + "\n" for row in ROWS))
    with pytest.raises(InputError, match="row 1: column 'task' is empty or its class is hidden"):
        clients_of(path, {"by": "column", "column": "task"})
    with pytest.raises(InputError, match=r"partition.column: no column 'tasks'; known: question"):
        clients_of(path, {"by": "column", "column": "tasks"})


def test_a_broken_image_is_named(tmp_path):
    table = [{"image": {"bytes": b"none", "path": None}, "label": "a"}] * 20
    datasets.Dataset.from_list(table).to_parquet(tmp_path / "p.parquet")
    clients = clients_of(tmp_path / "p.parquet", EQUAL | {"clients": 1}, kind="image", columns={})
    with pytest.raises(InputError, match=r"p.parquet: row \d+: broken image; replace or remove"):
        clients[0].read()


@pytest.fixture
def not_utf8(tmp_path):
    """Sixty rows, of which the fourth has a question that is no UTF-8."""
    rows = datasets.Dataset.from_list(ROWS).data.table
    words = [b"caf\xe9" if i == 3 else b"q" for i in range(60)]
    questions = pyarrow.array(words, pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(rows.set_column(0, "question", questions), tmp_path / "q.parquet")
    return tmp_path / "q.parquet"


@pytest.mark.parametrize("partition", [EQUAL, {"by": "column", "column": "question"}])
def test_text_that_is_not_utf8_is_named(not_utf8, partition):
    """Be it in a record or what the rows are cut by."""
    with pytest.raises(InputError, match=r"q.parquet: row 4: column 'question' is not UTF-8; mend"):
        all_records(clients_of(not_utf8, partition))


def test_half_of_a_surrogate_pair_is_named(tmp_path):
    """In a class's name; in JSON `datasets` itself refuses it."""
    names = datasets.ClassLabel(names=["no", "\ud800"])
    features = datasets.Features({"instruction": datasets.Value("string"), "output": names})
    rows = [{"instruction": "ok?", "output": i % 2} for i in range(20)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(
        InputError, match=r"d: column 'output': the class '\\ud800' holds '\\ud800'"
    ):
        clients_of(tmp_path / "d", EQUAL, columns={})
    for name in ("r.jsonl", "r.json"):
        rows = [{"instruction": "a", "output": "\ud800" if i == 5 else "b"} for i in range(60)]
        lines = json.dumps(rows) if name == "r.json" else "\n".join(map(json.dumps, rows))
        (tmp_path / name).write_text(lines)
        with pytest.raises(InputError, match=rf"{name}: .*(surrogate|row)") as told:
            all_records(clients_of(tmp_path / name, EQUAL, columns={}))
        assert "\n" not in str(told.value)


def test_names_of_clients_that_cannot_be_encoded_are_refused(rows):
    """So that their bytes can seed their cuts."""
    with pytest.raises(InputError, match=r"data.sources: 'a\\ud800' cannot name a client's files"):
        clients_of({"a\ud800": str(rows)})


def test_a_client_too_small_to_test_is_refused(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(InputError, match=r"client 'lone' has 1 record of .*one.jsonl"):
        clients_of({"lone": str(path)})


def test_one_dataset_wants_a_partition_and_clients_that_exist(tmp_path, rows):
    with pytest.raises(InputError, match=r"this is one dataset; say in partition.by how to cut it"):
        clients_of(rows)
    with pytest.raises(InputError, match=r"nowhere: no such folder or file, and no hub id"):
        clients_of(tmp_path / "nowhere")


def test_a_category_may_be_missing(tmp_path):
    path = tmp_path / "rows.jsonl"
    some = [{**row, "category": None if i % 2 else "odd"} for i, row in enumerate(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    assert {record.category for record in all_records(clients_of(path, EQUAL))} == {"odd", ""}
