"""Broken images are told before the first round, all at once; odd ones are used as they are."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import fedalt
from fedalt.config import Config
from fedalt.config.settings import config_from_dict
from fedalt.data import ImageRecord, broken_images

NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
ODD = {
    "gray.png": Image.fromarray(NOISE[..., 0]),
    "alpha.png": Image.fromarray(NOISE),
    "palette.png": Image.fromarray(NOISE[..., :3]).quantize(16),
    "bits.png": Image.fromarray(NOISE[..., 0].astype(np.uint16) << 8),
    "ink.jpg": Image.fromarray(NOISE, "CMYK"),
    "one.bmp": Image.fromarray(NOISE[..., 0]).convert("1"),
}


def encoded(name: str, image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if name.endswith("jpg") else name.rpartition(".")[2].upper())
    return buffer.getvalue()


@pytest.fixture
def config(tmp_path) -> Config:
    """Two clients whose images are odd, and whole."""
    for client in ("ann", "bob"):
        for part in ("train", "test"):
            for label in ("cat", "dog"):
                folder = tmp_path / "data" / client / part / label
                folder.mkdir(parents=True)
                for name, image in ODD.items():
                    (folder / name).write_bytes(encoded(name, image))
    settings = {
        "rounds": 1,
        "threads": 1,
        "out": str(tmp_path / "run"),
        "model": {"path": "builtin-vit"},
        "lora": {"modules_to_save": ["classifier"], "target_modules": ["q_proj"]},
        "data": {"path": str(tmp_path / "data"), "kind": "image"},
        "train": {"max_steps": 2, "batch_size": 6},
    }
    return config_from_dict(settings)


def test_odd_images_are_used_as_they_are(config):
    results = fedalt.Federation(config).run().results
    assert all(client["trained_rounds"] for client in results["clients"].values())


def test_broken_ones_are_told_before_anything_is_written(config, tmp_path):
    root = tmp_path / "data"
    whole = encoded("a.jpg", Image.fromarray(NOISE[..., :3]))
    (root / "bob" / "test" / "dog" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "ann" / "train" / "cat" / "empty.png").write_bytes(b"")
    (root / "ann" / "train" / "dog" / "text.png").write_text("no image")
    png = encoded("a.png", Image.fromarray(NOISE[..., :3]))
    (root / "bob" / "train" / "cat" / "cut.png").write_bytes(png[: len(png) // 2])
    with pytest.raises(fedalt.InputError) as caught:
        fedalt.Federation(config).run()
    message = str(caught.value)
    assert "\n" not in message
    told = ("empty.png: not an image", "text.png: not an image", "cut.png: broken image: ")
    assert all(part in message for part in told)
    assert message.endswith("; and 1 more")
    assert not (tmp_path / "run").exists()


def test_images_in_memory_are_looked_at_too():
    images = [NOISE[..., :3], NOISE.astype(np.float32), Image.new("F", (4, 4)), ODD["palette.png"]]
    faults = broken_images([ImageRecord(image, "cat") for image in images])
    assert len(faults) == 2
    assert "an array of float32, wants uint8" in faults[0]
    assert "mode F has no fixed range" in faults[1]


def test_a_run_goes_on_where_its_images_are_whole_again(config, tmp_path):
    broken = tmp_path / "data" / "ann" / "train" / "cat" / "empty.png"
    broken.write_bytes(b"")
    with pytest.raises(fedalt.InputError, match=r"empty\.png: not an image; replace or remove"):
        fedalt.Federation(config).run()
    broken.unlink()
    assert fedalt.Federation(replace(config, rounds=1)).run().out.is_dir()
