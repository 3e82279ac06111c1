"""Configs: YAML in, the same YAML out, everything unknown refused by name."""

import dataclasses

import pytest

from fedalt.config.schema import Config
from fedalt.config.settings import config_from_dict, load_config
from fedalt.errors import InputError


def test_yaml_round_trip_keeps_every_setting(tmp_path):
    config = load_config(None, ("train.learning_rate=3e-4", "lora.target_modules=[q_proj, v_proj]"))
    path = tmp_path / "c.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    assert config.train.learning_rate == 3e-4
    assert config.lora.target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (r".*layers\.[01]\..*_proj", r".*layers\.[01]\..*_proj"),
        ("q_proj", "q_proj"),  # as in PEFT, a pattern for the whole name
        ("[q_proj]", ("q_proj",)),
        ("all-linear", ("all-linear",)),
        ("All-Linear", ("all-linear",)),
    ],
)
def test_target_modules_are_a_list_or_a_pattern_and_stay_so_in_yaml(text, meant, tmp_path):
    config = load_config(None, (f"lora.target_modules={text}",))
    assert config.lora.target_modules == meant
    path = tmp_path / "c.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config


def test_overrides_lie_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("rounds: 3\ntrain: {batch_size: 2}\n")
    config = load_config(path, ("rounds=5", "train.max_steps=null"))
    assert (config.rounds, config.train.batch_size, config.train.max_steps) == (5, 2, None)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().rounds = 3


def test_flat_names_every_leaf_once():
    flat = Config().flat()
    assert flat["train.batch_size"] == Config().train.batch_size
    assert flat["partition.superclasses"] == {}
    assert not {"train", "partition"} & flat.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": {"batchsize": 8}}, "unknown key train.batchsize; did you mean train.batch_size"),
        ({"learning_rate": 1.0}, "unknown key learning_rate; did you mean train.learning_rate"),
        ({"lora": {"rnak": 8}}, "unknown key lora.rnak; did you mean lora.rank"),
        ({"zzz": 1}, "unknown key zzz; known: method, rounds"),
        ({"lora": {"rank": 0}}, "lora.rank must be at least 1, got 0"),
        ({"lora": {"rank": "8"}}, "lora.rank must be a whole number, got '8'"),
        ({"lora": {"rank": True}}, "lora.rank must be a whole number, got True"),
        ({"lora": {"dropout": 1.0}}, r"lora.dropout must be in \[0, 1\), got 1.0"),
        ({"lora": {"target_modules": 3}}, "lora.target_modules must be a list of names, got 3"),
        ({"lora": {"target_modules": ""}}, "target_modules must be a list of names or a pattern"),
        ({"lora": {"target_modules": []}}, "target_modules must be a list of names or a pattern"),
        ({"lora": 3}, "lora must be a group of settings, got 3"),
        ({"train": {"learning_rate": "fast"}}, "train.learning_rate must be a number, got 'fast'"),
        ({"train": {"lr_scheduler": "sin"}}, "train.lr_scheduler must be one of linear"),
        ({"model": {"dtype": "int8"}}, "model.dtype must be one of float32"),
        ({"data": {"prompt": "hello"}}, "data.prompt must be a .* {instruction}, got 'hello'"),
        ({"data": {"splits": ["a", "a"]}}, "data.splits must be a list of different names"),
        ({"model": {"path": "builtin-vit"}}, "model.path must be a model for data.kind=text, got"),
        ({"data": {"kind": "image"}}, "model.path must be a model for data.kind=image, got 'built"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        config_from_dict(settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"rounds: [", "c.yaml:1: broken YAML"),
        (b"- 1\n", "c.yaml: wants a mapping of settings, got list"),
        (b"method: \xff", "c.yaml: not UTF-8 text"),
        (b"rounds: none\n", "c.yaml: rounds must be a whole number, got 'none'"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds", "-c rounds: wants key.path=value"),
        ("=3", "-c =3: wants key.path=value"),
        ("rounds.deep=3", "'rounds' holds a value, not a group of settings"),
        ("rounds=[", r"-c rounds=\[: the value is not readable as YAML"),
        ("zzz=1", "unknown key zzz; known: method, rounds"),
    ],
)
def test_a_bad_override_is_refused(tmp_path, override, message):
    path = tmp_path / "c.yaml"
    path.write_text("rounds: 3\n")
    with pytest.raises(InputError, match=message):
        load_config(path, (override,))


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"nowhere.yaml: cannot read the config"):
        load_config("nowhere.yaml")
