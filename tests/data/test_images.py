"""Image clients: the digits, folders of images, pixels, and the classifier that sees them."""

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import ViTImageProcessorPil

from fedalt.config.schema import BUILTIN_VIT, ModelConfig
from fedalt.data import digits
from fedalt.data.digits import DOMAINS, client_digits, digits_clients, public_digits, seen_by
from fedalt.data.images import ImageRecord, domain_clients, pixels, read_image_folder
from fedalt.errors import InputError
from fedalt.model.vision import load_image_base

Base = tuple[nn.Module, object]
DIGIT_NAMES = [str(digit) for digit in range(10)]


def save_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3)).save(path)
    return path


def names(records: list[ImageRecord]) -> list[str]:
    return [f"{r.label}/{r.image.name}" for r in records if isinstance(r.image, Path)]


def fault_of(record: ImageRecord) -> str:
    with pytest.raises(InputError) as caught:
        pixels([record], SimpleNamespace(image_mean=[0.5] * 3))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def numbered_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """1797 images that carry their own number: left half the low byte, right half the high one."""
    numbers = np.arange(1797)
    images = np.repeat(np.stack([numbers % 256, numbers // 256], -1), 4, axis=1)[:, None]
    images = np.broadcast_to(images, (1797, 8, 8)).astype(np.uint8)
    monkeypatch.setattr(digits, "_load", lambda: (images, numbers % 10))
    monkeypatch.setattr(digits, "DOMAINS", dict.fromkeys(DOMAINS, lambda image, rng: image))


def number_of(record: ImageRecord) -> int:
    """A quarter to the left brings the right half to the top."""
    return int(record.image[-1, 0]) + 256 * int(record.image[0, 0])


def test_every_client_has_its_shares_and_no_image_is_dealt_twice(numbered_digits: None) -> None:
    clients = digits_clients(0)
    dealt = [number_of(record) for parts in clients.values() for part in parts for record in part]
    assert len(dealt) == len(set(dealt)) == 8 * (64 + 56)
    assert all(number % 3 for number in dealt)
    assert len(public_digits()) == 599
    train, test = clients["faded"]  # the second client: 3, 4, 5, 6, 7, 8
    assert Counter(r.label for r in train) == {"3": 20, "4": 16, "5": 12, "6": 8, "7": 5, "8": 3}
    assert Counter(r.label for r in test) == {"3": 17, "4": 14, "5": 10, "6": 8, "7": 4, "8": 3}
    assert {r.category for r in train + test} == {"faded"}
    assert client_digits(3) == [9, 0, 1, 2, 3, 4]


def test_the_seed_deals_and_public_digits_have_no_twins() -> None:
    pytest.importorskip("sklearn")
    one, same, other = (
        [r.image.tobytes() for parts in digits_clients(seed).values() for r in parts[0] + parts[1]]
        for seed in (1, 1, 2)
    )
    assert one == same != other
    held = {r.image.tobytes() for r in digits.client_images()}
    assert len(held) == 1198
    assert not held & {r.image.tobytes() for r in public_digits()}


UPRIGHT = np.array([[30, 60], [20, 50], [10, 40]], dtype=np.uint8)
SEEN = {  # turned left, UPRIGHT is 60 50 40 over 30 20 10
    "plain": [[60, 50, 40], [30, 20, 10]],
    "faded": [[24, 20, 16], [12, 8, 4]],
    "noisy": [[255, 0, 40], [31, 20, 10]],  # with the noise of the test below
    "blurred": [[18, 23, 13], [18, 23, 13]],  # 160/9, 210/9, 120/9
    "fogged": [[132, 126, 120], [114, 108, 102]],
    "shifted": [[40, 60, 50], [10, 30, 20]],
    "inverted": [[195, 205, 215], [225, 235, 245]],
    "mirrored": [[40, 50, 60], [10, 20, 30]],
}


@pytest.mark.parametrize("domain", DOMAINS)
def test_domains_by_hand(domain: str) -> None:
    noise = np.array([[300, -300, 0.4], [0.6, 0, 0]])
    rng = SimpleNamespace(normal=lambda mean, spread, shape: noise)
    assert seen_by(domain, UPRIGHT, rng).tolist() == SEEN[domain]


def test_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"pip install 'fedalt\[data\]'"):
        public_digits()


def test_a_client_folder(tmp_path: Path) -> None:
    root = tmp_path / "bern"
    for name in ("train/cat/b.png", "train/cat/a.JPG", "train/ant/c.bmp", "test/cat/d.webp"):
        save_image(root / name)
    save_image(root / "train/.hidden/e.png")
    (root / "train/cat/notes.txt").write_text("no image")
    (root / "train/cat/._a.png").write_text("no image")
    (root / "test/cat/e.png").write_text("no image, but that is not noticed before pixels")
    train, test = read_image_folder(root)
    assert names(train) == ["ant/c.bmp", "cat/a.JPG", "cat/b.png"]
    assert names(test) == ["cat/d.webp", "cat/e.png"]
    assert {r.category for r in train + test} == {"bern"}
    assert fault_of(test[1]).endswith("test/cat/e.png: not an image; replace or remove the file")


def test_a_client_folder_without_a_part_or_an_image(tmp_path: Path) -> None:
    save_image(tmp_path / "train/cat/a.png")
    with pytest.raises(InputError, match=r"test: missing; .*train/CLASS and test/CLASS"):
        read_image_folder(tmp_path)
    (tmp_path / "test" / "cat").mkdir(parents=True)
    with pytest.raises(InputError, match="test: no image"):
        read_image_folder(tmp_path)


@pytest.fixture
def domains(tmp_path: Path) -> Path:
    """Two domains of two classes, 11 and 9 images."""
    for domain, count in (("sketch", 11), ("real", 9)):
        for i in range(count):
            save_image(tmp_path / domain / ("cat" if i % 2 else "dog") / f"{i:02}.png")
    (tmp_path / "sketch_train.txt").write_text("lists of DomainNet lie beside its domains")
    return tmp_path


def test_domains_are_cut_into_clients(domains: Path) -> None:
    clients = domain_clients(domains, clients_per_domain=2, test_share=0.25, seed=3)
    assert [name for name, _, _ in clients] == ["real-00", "real-01", "sketch-00", "sketch-01"]
    assert [(len(train), len(test)) for _, train, test in clients] == [
        (4, 1),
        (3, 1),
        (4, 2),
        (4, 1),
    ]
    dealt = [r.image for _, train, test in clients for r in train + test]
    assert sorted(dealt) == sorted(domains.glob("*/*/*.png"))
    assert {r.category for r in clients[0][1]} == {"real"}


def test_the_deal_depends_on_the_seed_alone(domains: Path) -> None:
    def deal(seed: int) -> list[tuple[str, list[str], list[str]]]:
        return [(n, names(a), names(b)) for n, a, b in domain_clients(domains, 2, 0.25, seed)]

    both = deal(3)
    assert deal(3) == both != deal(4)
    (domains / "real").rename(domains / ".hidden")
    assert deal(3) == both[2:]


def test_domain_faults(domains: Path) -> None:
    with pytest.raises(InputError, match="real: 9 images for 5 clients"):
        domain_clients(domains, 5, 0.25, seed=0)


def test_fingerprints_tell_records_apart(tmp_path: Path) -> None:
    array = np.zeros((2, 3), dtype=np.uint8)
    file = save_image(tmp_path / "a.png")
    images = [array, array.reshape(3, 2), array + 1, Image.fromarray(array), file]
    records = [ImageRecord(array, "dog"), ImageRecord(array, "cat", "sketch")]
    records += [ImageRecord(image, "cat") for image in images]
    marks = [record.fingerprint_bytes() for record in records]
    assert len(set(marks)) == 7
    assert ImageRecord(array.copy(), "cat").fingerprint_bytes() == marks[2]
    moved = ImageRecord(save_image(tmp_path / "elsewhere" / "a.png"), "cat")
    assert moved.fingerprint_bytes() == marks[-1]
    file.unlink()
    with pytest.raises(InputError, match=r"a\.png: cannot read"):
        records[-1].fingerprint_bytes()


@pytest.fixture(scope="module")
def base() -> Base:
    return load_image_base(ModelConfig(BUILTIN_VIT), DIGIT_NAMES)


def test_pixels_by_hand(base: Base) -> None:
    """(v / 255 - 0.5) / 0.5, gray on all three channels; 8 x 8 already, so nothing is resized."""
    image = np.zeros((8, 8), dtype=np.uint8)
    image[0, :3] = [255, 51, 102]
    wanted = torch.full((1, 3, 8, 8), -1.0)
    wanted[:, :, 0, :3] = torch.tensor([1.0, -0.6, -0.2])
    torch.testing.assert_close(pixels([ImageRecord(image, "0")], base[1]), wanted)


def test_pixels_are_resized_as_the_processor_says(base: Base) -> None:
    halves = np.zeros((16, 32), dtype=np.uint8)
    halves[:, 16:] = 255
    seen = pixels([ImageRecord(halves, "0")], base[1])[0, 0]
    whole = Image.fromarray(halves).resize((8, 8), Image.Resampling.BILINEAR)
    torch.testing.assert_close(seen, torch.from_numpy(np.asarray(whole) / 127.5 - 1).float())


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "CMYK", "I;16"])
def test_every_kind_of_file_is_read(base: Base, tmp_path: Path, mode: str) -> None:
    image = Image.new("L", (8, 8), 255).convert(mode.partition(";")[0])
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 255 * 256, dtype=np.uint16))
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    seen = pixels([ImageRecord(path, "0"), ImageRecord(image, "0")], base[1])
    torch.testing.assert_close(seen, torch.ones(2, 3, 8, 8), atol=0.02, rtol=0)


def test_colours_keep_their_channels_and_alpha_is_dropped(base: Base) -> None:
    colour = np.full((8, 8, 4), [255, 0, 51, 0], dtype=np.uint8)
    records = [ImageRecord(colour, "0"), ImageRecord(colour[..., :3], "0")]
    for seen in pixels(records, base[1]):
        torch.testing.assert_close(seen[:, 0, 0], torch.tensor([1.0, -1.0, -0.6]))
    one = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    assert pixels(records, one).shape == (2, 1, 8, 8)


def test_a_photo_is_turned_upright(base: Base, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 3  # orientation: upside down
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png", exif=exif)
    photo, upright = ImageRecord(tmp_path / "a.png", "0"), ImageRecord(np.rot90(ramp, 2), "0")
    assert torch.equal(pixels([photo], base[1]), pixels([upright], base[1]))


def test_broken_images_are_named(tmp_path: Path) -> None:
    cut = tmp_path / "cut.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    assert fault_of(ImageRecord(cut, "cat")).startswith(f"{cut}: broken image: ")
    assert fault_of(ImageRecord(tmp_path / "gone.png", "cat")).endswith("gone.png: no such image")
    wrong = {
        "an array of float64, wants uint8": np.zeros((4, 4)),
        "an array of shape (4, 4, 2)": np.zeros((4, 4, 2), dtype=np.uint8),
        "an array of shape (0, 4)": np.zeros((0, 4), dtype=np.uint8),
        "mode F has no fixed range": Image.new("F", (4, 4)),
    }
    for reason, image in wrong.items():
        assert f"of class 'cat': broken image: {reason}" in fault_of(ImageRecord(image, "cat"))


def head_for(classes: list[str]) -> tuple[dict[str, int], torch.Tensor]:
    model = load_image_base(ModelConfig(BUILTIN_VIT), classes, ("classifier",))[0]
    return model.config.label2id, model.classifier.weight


@pytest.mark.parametrize("count", [3, 10])
def test_a_new_head_is_equal_everywhere(base: Base, count: int) -> None:
    """With ten other classes the checkpoint's head would fit in shape, but not in meaning."""
    classes = [f"class {i}" for i in range(count)]
    label2id, weight = head_for(classes[::-1])
    torch.manual_seed(99)
    state = torch.get_rng_state()  # not touched by the new head
    again, other_weight = head_for([*classes, classes[0]])
    assert torch.equal(torch.get_rng_state(), state)
    assert label2id == again == {name: row for row, name in enumerate(classes)}
    assert torch.equal(weight, other_weight)
    assert not torch.equal(weight, base[0].classifier.weight)


def test_the_base_is_frozen_and_knows_upright_digits(base: Base) -> None:
    pytest.importorskip("sklearn")
    model, processor = base
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    label2id, head = head_for(["7", "1"])  # a head that knows all classes is kept
    assert label2id == {name: row for row, name in enumerate(DIGIT_NAMES)}
    assert torch.equal(head, model.classifier.weight)

    def accuracy(records: list[ImageRecord]) -> float:
        with torch.inference_mode():
            answers = model(pixel_values=pixels(records, processor)).logits.argmax(-1).tolist()
        return sum(str(a) == r.label for a, r in zip(answers, records, strict=True)) / len(records)

    assert accuracy(digits.client_images()[:400]) > 0.9
    assert all(accuracy(test) < 0.5 for _, test in digits_clients(0).values())


def test_models_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\Amodel\.path: cannot load .*\Z"):
        load_image_base(ModelConfig(str(tmp_path)), ["cat"])
    with pytest.raises(InputError, match=r"model\.device: 'nonsense' cannot be used"):
        load_image_base(ModelConfig(BUILTIN_VIT, device="nonsense"), ["cat"])
    with pytest.raises(InputError, match=r"does not know.*lora\.modules_to_save=\[classifier\]"):
        load_image_base(ModelConfig(BUILTIN_VIT), ["cat"])
