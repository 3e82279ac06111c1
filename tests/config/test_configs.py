"""The ready configs: each loads, and its data and partition fit small data of the same form."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedalt.config.schema import Config
from fedalt.config.settings import READY, load_config
from fedalt.data import load_clients
from fedalt.errors import InputError
from tests.conftest import write_client
from tests.data.test_suites import ROWS

NAMES = sorted(path.stem for path in READY.glob("*.yaml"))
DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")


def config_of(name, **overrides):
    pairs = tuple(f"{key.replace('__', '.')}={value}" for key, value in overrides.items())
    return load_config(name, pairs)


def clients_of(config: Config):
    return load_clients(config.data, config.partition, config.seed)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The `datasets` library with its cache in the test's own folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


@pytest.fixture
def cifar(tmp_path, hub):
    """6000 tiny images in CIFAR-100's columns, 100 classes in 20 superclasses, two splits."""
    features = hub.Features(
        {
            "img": hub.Image(),
            "fine_label": hub.ClassLabel(names=[f"fine{i:02d}" for i in range(100)]),
            "coarse_label": hub.ClassLabel(names=[f"coarse{i:02d}" for i in range(20)]),
        }
    )
    image = Image.fromarray(np.zeros((2, 2, 3), np.uint8))
    (tmp_path / "cifar100").mkdir()
    for split, each in (("train", 50), ("test", 10)):
        fine = [i % 100 for i in range(100 * each)]
        table = {"img": [image] * len(fine), "fine_label": fine}
        table["coarse_label"] = [label // 5 for label in fine]
        whole = hub.Dataset.from_dict(table, features=features)
        whole.to_parquet(tmp_path / "cifar100" / f"{split}-00000-of-00001.parquet")
    return tmp_path / "cifar100"


def labels_of(client):
    parts = client.read()
    return [record.label for part in (parts.train, parts.test) for record in part]


def test_the_configs_are_these():
    assert NAMES == [
        "bloom-560m-flan",
        "commonsense",
        "digits",
        "llama2-7b-flan",
        "vit-cifar100-gl-dir",
        "vit-cifar100-patho",
        "vit-cifar100-sc-dir",
        "vit-domainnet",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_config_loads_and_shows_how_to_run_it(name):
    assert config_of(name).method == "fedalt"
    assert f"fedalt run {name}" in (READY / f"{name}.yaml").read_text()


def test_the_folder_at_the_top_is_the_packages():
    assert (Path(__file__).parents[2] / "configs").samefile(READY)


def test_a_file_wins_over_a_ready_config_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # of data, perhaps
    assert load_config("digits").data.path == "digits"
    (tmp_path / "digits").rmdir()
    (tmp_path / "digits").write_text("rounds: 77")
    assert load_config("digits").rounds == 77


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(InputError) as error:
        load_config("digts")
    known = ", ".join(NAMES)
    assert str(error.value) == (
        f"digts: no such file and no ready config; did you mean digits? known: {known}"
    )


def test_llama_has_the_papers_settings():
    config = config_of("llama2-7b-flan")
    assert (config.rounds, config.lora.rank, config.lora.alpha, config.lora.dropout) == (
        20,
        8,
        32.0,
        0.05,
    )
    assert config.lora.target_modules == ("q_proj", "v_proj")
    train = config.train
    assert (train.batch_size, train.epochs, train.max_steps) == (8, 5, None)
    assert (train.learning_rate, train.weight_decay, train.lr_scheduler) == (3e-4, 0.05, "linear")
    assert (config.evaluate.num_beams, config.evaluate.max_new_tokens) == (4, 80)
    assert config.data.max_length == 512


@pytest.mark.parametrize("name", ["llama2-7b-flan", "bloom-560m-flan"])
def test_flan_is_a_folder_a_client(name, tmp_path):
    for task in ("coreference", "entailment"):
        write_client(tmp_path / "flan" / task, task[0], 4)
    clients = clients_of(config_of(name, data__path=tmp_path / "flan"))
    assert [client.id for client in clients] == ["coreference", "entailment"]
    assert len(clients[0].read().train) == 4


def test_flan_may_be_one_file_that_is_cut_by_task(tmp_path, hub):
    rows = [{"inputs": f"q{i}", "targets": "a", "task": f"t{i % 8}"} for i in range(160)]
    path = tmp_path / "flan.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(
        "llama2-7b-flan",
        data__path=path,
        data__columns="{instruction: inputs, output: targets}",
        partition="{by: column, column: task}",
    )
    assert [client.id for client in clients_of(config)] == [f"t{i}" for i in range(8)]


def test_cifar_classes_are_dealt_out_ten_a_client(cifar):
    clients = clients_of(config_of("vit-cifar100-patho", data__path=cifar))
    held = [labels_of(client) for client in clients]
    assert sum(map(len, held)) == 6000
    assert [len(set(labels)) for labels in held] == [10] * 100


@pytest.mark.parametrize(("name", "alpha", "size"), [("gl-dir", 0.3, 1), ("sc-dir", 3, 5)])
def test_cifar_is_shared_as_the_config_says(name, alpha, size, cifar):
    """The squares of 100 shares from Dir(a, ..., a) sum to (1 + a) / (1 + 100 a) in the mean."""
    clients = clients_of(config_of(f"vit-cifar100-{name}", data__path=cifar))
    counts = np.zeros((100 // size, 100))
    for number, client in enumerate(clients):
        for label in labels_of(client):
            counts[int(label.removeprefix("fine")) // size, number] += 1
    assert np.all(counts.sum(axis=1) == 60 * size)
    squares = ((counts / (60 * size)) ** 2).sum(axis=1).mean()
    assert squares == pytest.approx((1 + alpha) / (1 + 100 * alpha), rel=0.15)


def test_domainnet_is_dealt_to_ninety_clients(tmp_path):
    for domain in DOMAINS:
        for name in ("aircraft_carrier", "train"):
            folder = tmp_path / "domainnet" / domain / name
            folder.mkdir(parents=True)
            for number in range(30):
                Image.new("RGB", (2, 2)).save(folder / f"{domain}_{number}.jpg")
    small = config_of("vit-domainnet", data__path=tmp_path / "domainnet", partition__min_records=4)
    clients = clients_of(small)
    assert len(clients) == 90
    assert {client.id.partition("-")[0] for client in clients} == set(DOMAINS)
    assert {len(labels_of(client)) for client in clients} == {4}


def test_commonsense_is_a_suite_a_client(tmp_path, hub):
    config = config_of("commonsense")
    assert len(config.data.sources) == 8
    paths = {}
    for client in config.data.sources:
        suite = client.partition("-")[0]
        paths[client] = str(tmp_path / f"{client}.parquet")
        hub.Dataset.from_list([ROWS[suite]] * 20).to_parquet(paths[client])
    clients = clients_of(config_of("commonsense", data__sources=json.dumps(paths)))
    assert [client.id for client in clients] == sorted(paths)
    for client in clients:
        parts = client.read()
        assert (len(parts.train), len(parts.test)) == (18, 2)
        assert {record.category for record in parts.test} == {client.id.partition("-")[0]}


def test_digits_need_nothing_but_the_package():
    pytest.importorskip("sklearn")
    clients = clients_of(config_of("digits"))
    assert len(clients) == 8
    assert len(clients[0].read().test) == 56
