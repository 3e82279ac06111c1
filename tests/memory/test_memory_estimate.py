"""``fedalt memory``: what it foretells beside what a process really takes, and what it says."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from fedalt.cli import main
from fedalt.config.settings import load_config
from fedalt.memory import memory
from fedalt.memory.rehearsal import Rehearsal
from fedalt.memory.tracker import Kind
from fedalt.model import base as models
from fedalt.model.quantized import is_quantized
from fedalt_kernels import QuantizedWeight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHANGES = [
    *(
        ("train", {"batch_size": batch, "gradient_checkpointing": recomputed})
        for batch in (4, 8)
        for recomputed in (False, True)
    ),
    ("train", {"batch_size": 8, "micro_batch": 2}),
    ("train", {"batch_size": 8, "loss_chunk": 32}),
    ("evaluate", {"batch_size": 16, "max_new_tokens": 24}),
    ("evaluate", {"batch_size": 48, "max_new_tokens": 24}),
]
RESETS = Path("/proc/self/clear_refs")


def llama(folder, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return {"target_modules": ["q_proj", "v_proj"]}, "text"


def gpt2(folder, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer.save_pretrained(folder)
    config = GPT2Config(vocab_size=2048, n_embd=192, n_layer=4, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return {"target_modules": ["c_attn", "c_proj"]}, "text"


def vit(folder, tokenizer):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    ViTImageProcessorPil(size={"height": 160, "width": 160}).save_pretrained(folder)
    config = ViTConfig(
        image_size=160,
        patch_size=8,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=2,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    return {"target_modules": ["all-linear"]}, "image"


MODELS = {"llama": llama, "gpt2": gpt2, "vit": vit}


@pytest.fixture(scope="module")
def configs(tmp_path_factory, tiny_base):
    """By model, the path of a config; its data are not at hand, so that lengths are assumed."""
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    paths = {}
    for name, make in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        lora, kind = make(folder, AutoTokenizer.from_pretrained(tiny_base))
        settings = {
            "model": {"path": str(folder), "device": DEVICE},
            "lora": lora,
            "data": {"path": "not/here", "kind": kind, "max_length": 256},
        }
        paths[name] = folder / "config.yaml"
        paths[name].write_text(yaml.safe_dump(settings))
    return paths


@pytest.fixture(scope="module")
def measured(configs):
    """By model, the real peaks over the loaded base under every change, in bytes.

    Blocks of 64 KiB or more are mapped on their own and go back to the system when they are freed;
    else the allocator would keep a peak's pages, and round them otherwise than an estimate can.
    """
    if DEVICE == "cpu" and not os.access(RESETS, os.W_OK):
        pytest.skip("this system does not set back the high-water mark of the resident set")
    work = [(str(configs[name]), *change) for name in MODELS for change in CHANGES]
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("memory_driver.py"), json.dumps(work)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **settings, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )
    peaks = iter(json.loads(done.stdout))
    return {name: [next(peaks) for _ in CHANGES] for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_the_peak_is_foretold_within_a_tenth(name, configs, measured):
    config = load_config(configs[name])
    rehearsal = Rehearsal(config)
    for (group, settings), real in zip(CHANGES, measured[name], strict=True):
        follow = rehearsal.training if group == "train" else rehearsal.evaluation
        parts = follow(replace(getattr(config, group), **settings), "none")
        foretold = parts.total() - parts[Kind.BASE] - parts[Kind.ADAPTERS]
        told = f"{foretold / 2**20:.1f} foretold, {real / 2**20:.1f} MiB measured"
        print(f"{name} {group} {settings}: {told}")
        assert abs(foretold - real) < 0.1 * real


def told(arguments, capsys):
    """What the command prints; its exit status is 0."""
    capsys.readouterr()
    assert main(["memory", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(arguments, capsys):
    """The one line in which the command refuses bad input."""
    capsys.readouterr()
    assert main(["memory", *map(str, arguments)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fedalt:")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def tiny(tiny_config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(tiny_config.to_yaml())
    return path


def test_the_sample_is_told_of_part_by_part(capsys):
    out = told([], capsys)
    assert "the longest of sample" in out
    rows = [line.strip("| ").split("|") for line in out.splitlines() if line.startswith("| ")]
    sizes = {cells[0].strip(): cells[1:] for cells in rows}
    for kind in (Kind.BASE, Kind.ADAPTED, Kind.ATTENTION, Kind.POINTWISE, Kind.OPTIMIZER):
        assert float(sizes[kind][0]) > 0
    assert float(sizes[Kind.CACHE][1]) > 0
    parts = [float(cells[0]) for name, cells in sizes.items() if name in set(Kind)]
    assert sum(parts) == pytest.approx(float(sizes["peak"][0]), rel=0.01)
    for option in ("train.gradient_checkpointing=true", "model.quantization=nf4"):
        assert option in sizes
    assert out.rstrip().endswith("fits")


def test_no_weights_are_read(tiny, tiny_base, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in tiny_base.iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())
    assert "peak" in told([tiny, "-c", f"model.path={bare}"], capsys)


def test_a_run_that_does_not_fit_is_told_what_helps(tiny, monkeypatch, capsys):
    planner = memory.Planner(load_config(tiny))
    halved = planner.need({"train.micro_batch": 2, "evaluate.batch_size": 1})
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(1.11 * halved.peak))
    last = told([tiny], capsys).splitlines()[-1]
    assert "does not fit; with -c " in last
    assert last.endswith("and fits")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    assert "does not fit, nor with all of these options" in told([tiny], capsys).splitlines()[-1]
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert "does not tell what is free" in told([tiny], capsys).splitlines()[-1]


def test_the_fewest_options_are_found(tiny):
    planner = memory.Planner(load_config(tiny))
    alone = {key: value for option in planner.options() for key, value in option.items()}
    for settings in ({"train.micro_batch": 1}, alone):
        free = int(1.001 * memory.MARGIN * planner.need(settings).peak)
        found, needed = planner.cure(free)
        assert memory.fits(needed, free)
        assert planner.need(found).peak == needed
        steps = [planner._lowest(option) for option in planner.options()]
        for fewer in itertools.combinations(steps, len(found) - 1):
            merged = {key: value for option in fewer for key, value in option.items()}
            assert not memory.fits(planner.need(merged).peak, free)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.batch_size=0", "train.batch_size must be at least 1, got 0"),
        ("model.path=no/such", "model.path: cannot load 'no/such'"),
        ("model.device=cuda:99", "model.device: 'cuda:99' cannot be used"),
        ("lora.target_modules=[q_porj]", "did you mean q_proj"),
        ("method=fedavg", "no method is named 'fedavg'"),
        ("data.path=nosuch.jsonl", "nosuch.jsonl: no such folder or file, and no hub id"),
        ("lora.impl=reference", "lora.impl: the memory of 'reference' is not told"),
    ],
)
def test_bad_settings_are_refused_in_one_line(setting, message, tiny, capsys):
    assert message in refused([tiny, "-c", setting], capsys)


def test_data_that_are_not_at_hand_are_assumed_long(tiny, capsys):
    out = told([tiny, "-c", "data.path=not/here", "-c", "data.max_length=64"], capsys)
    assert "4 x 64 tokens, 32 of them answer" in out
    assert "(data.max_length, half of it answer: here is not at hand)" in out


def test_a_base_that_the_method_changes_is_not_quantized(tiny, capsys):
    fp8 = [tiny, "-c", "method=flora", "-c", "model.quantization=fp8"]
    assert "flora adds to the base weights, which fp8 cannot take" in refused(fp8, capsys)
    assert "model.quantization=" not in told([tiny, "-c", "method=flora"], capsys)


def test_a_method_that_adds_to_the_base_keeps_its_first_weights(tiny):
    """Two layers of [32, 32] four times and [48, 32] thrice, in float32."""
    flora, plain = (load_config(tiny, (f"method={name}",)) for name in ("flora", "fedit"))
    held = [Rehearsal(each).training(each.train, "none")[Kind.BASE] for each in (flora, plain)]
    assert plain.model.device == "cpu"  # on a GPU they would be kept on the host
    assert held[0] - held[1] == 4 * 2 * (4 * 32 * 32 + 3 * 48 * 32)


def test_the_largest_rank_counts(tiny):
    config = load_config(tiny, ("method=local", "lora.client_ranks={ann: 8}"))
    plain = load_config(tiny, ("method=local",))
    larger, usual = (
        Rehearsal(each).training(each.train, "none")[Kind.ADAPTERS] for each in (config, plain)
    )
    assert larger == 4 * usual


def test_clients_that_train_together_each_take_what_one_does(tiny, capsys):
    """The adapted layers keep of two clients twice as much, and AdamW has twice the moments."""
    one, two = (
        Rehearsal(each).training(each.train, "none")
        for each in (load_config(tiny, (f"train.together={count}",)) for count in (1, 2))
    )
    assert two[Kind.OPTIMIZER] == 2 * one[Kind.OPTIMIZER]
    assert 1.9 * one[Kind.ADAPTED] <= two[Kind.ADAPTED] <= 2.2 * one[Kind.ADAPTED]
    lines = told([tiny, "-c", "train.together=2"], capsys)
    assert "training on 2 clients of" in lines
    assert "train.together=1" in lines


def test_a_checkpoint_of_few_bits_is_refused(tiny, tiny_base, tmp_path, capsys):
    shutil.copytree(tiny_base, tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": packed}))
    message = refused([tiny, "-c", f"model.path={path.parent}"], capsys)
    assert "is quantized already; its memory is not told" in message


def test_a_new_head_that_nobody_trains_is_refused(configs, tmp_path, capsys):
    for label in ("cat", "dog"):
        (tmp_path / "ann" / label).mkdir(parents=True)
        for number in range(4):
            image = Image.new("RGB", (8, 8), (number, 0, 0))
            image.save(tmp_path / "ann" / label / f"{number}.png")
    images = [configs["vit"], "-c", f"data.path={tmp_path}", "-c", "lora.target_modules=[q_proj]"]
    message = refused(images, capsys)
    assert "does not know the classes; train a new one with lora.modules_to_save=[class" in message
    assert "peak" in told([*images, "-c", "lora.modules_to_save=[classifier]"], capsys)


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_quantized_weights_take_the_bytes_of_a_loaded_base(kind):
    pytest.importorskip("bitsandbytes")
    config = load_config(None, (f"model.quantization={kind}",))
    model = models.load_base(config.model)[0]
    kept = {}
    packed = []
    for module in model.modules():
        if is_quantized(module):
            packed.append(QuantizedWeight.of(module).nbytes)
        else:
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            kept |= {id(tensor): tensor.nbytes for tensor in own}
    assert len(packed) == 7 * model.config.num_hidden_layers
    foretold = Rehearsal(config).training(config.train, kind)[Kind.BASE]
    print(f"{kind}: {foretold} foretold, {sum(packed) + sum(kept.values())} loaded")
    assert foretold == sum(packed) + sum(kept.values())


def test_a_pattern_takes_what_the_names_it_fits_take(tiny_config):
    both = (r".*\.(q|v)_proj", ("q_proj", "v_proj"))
    loras = [replace(tiny_config.lora, target_modules=targets) for targets in both]
    pattern, names = (Rehearsal(replace(tiny_config, lora=lora)) for lora in loras)
    train = tiny_config.train
    assert pattern.training(train, "none") == names.training(train, "none")
