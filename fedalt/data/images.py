"""Image clients: records that hold an image or the path of one, folders of them, and pixels.

Files are decoded when ``pixels`` needs them, and once beforehand (`broken_images`), so a record of
a large data set costs a path.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from fedalt.errors import InputError, first_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image, its class and the domain that it comes from.

    Attributes:
        image: a file; a uint8 array [H, W] or [H, W, C], C of 1 (gray), 3 (RGB) or 4 (RGBA); or an
            image of Pillow.
        label: the name of the class.
        category: the domain, such as ``sketch``; may be empty.
    """

    image: Path | np.ndarray | Image.Image
    label: str
    category: str = ""

    def fingerprint_bytes(self) -> bytes:
        """What a SHA-256 over a client's records takes of this one.

        An array or an image counts in full. A file counts by its name and its size in bytes, which
        a new version of it hardly ever keeps: reading a large data set through takes minutes.

        Raises:
            InputError: the file is not there, or an image of Pillow cannot be decoded.
        """
        head = f"{self.label}\0{self.category}\0"
        if isinstance(self.image, Path):
            named = f"{head}{self.image.name}\0{_size(self.image)}\0"  # of any bytes, as files are
            return named.encode(errors="surrogateescape")
        if isinstance(self.image, np.ndarray):
            array = np.ascontiguousarray(self.image)
            return f"{head}{array.shape} {array.dtype}\0".encode() + array.tobytes()
        with _reading(self):
            return f"{head}{self.image.mode} {self.image.size}\0".encode() + self.image.tobytes()

    def name(self) -> str:
        """How a message calls the image: its path, or its form and label."""
        if isinstance(self.image, Path):
            return str(self.image)
        return f"{type(self.image).__name__} of class {self.label!r}"


@dataclass(frozen=True)
class ImageExample:
    """A record with its class as the row of the model's head."""

    record: ImageRecord
    label: int


def read_image_folder(root: str | Path) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """The records of one client: ``root/train/CLASS/*`` and ``root/test/CLASS/*``.

    Returns:
        Train and test records in the order of class and file names. The category is the folder's
        own name.

    Raises:
        InputError: a part is missing or holds no image.
    """
    root = Path(root)
    parts = []
    for part in ("train", "test"):
        folder = root / part
        if not folder.is_dir():
            raise InputError(f"{folder}: missing; an image client wants train/CLASS and test/CLASS")
        parts.append(list(_class_folders(folder, category=root.name)))
        if not parts[-1]:
            raise InputError(f"{folder}: no image; wants CLASS/*.png, jpg, jpeg, webp or bmp")
    train, test = parts
    return train, test


def domain_clients(
    root: str | Path, clients_per_domain: int, test_share: float, seed: int
) -> list[tuple[str, list[ImageRecord], list[ImageRecord]]]:
    """Clients out of ``root/DOMAIN/CLASS/*``, DomainNet's layout: each domain is dealt out.

    Args:
        root: one folder a domain.
        clients_per_domain: 1 or more equal cuts, up to one image, of every domain at random.
        test_share: of every client's images, in (0, 1); at least one is tested, one trained on.
        seed: of the deal; a domain's deal does not depend on which other domains are there.

    Returns:
        ``(id, train, test)`` by domain and number, ids ``DOMAIN-00``, ``DOMAIN-01``, ...; the
        category is the domain.

    Raises:
        InputError: no image, or a domain too small for so many clients.
    """
    root = Path(root)
    digits = max(2, len(str(clients_per_domain - 1)))
    clients = []
    for folder in subfolders(root):
        records = list(_class_folders(folder, category=folder.name))
        if not records:
            raise InputError(f"{folder}: no image; wants CLASS/*.jpg, png, jpeg, webp or bmp")
        if len(records) < 2 * clients_per_domain:
            raise InputError(
                f"{folder}: {len(records)} images for {clients_per_domain} clients of two or more "
                "each; lower partition.clients"
            )
        random.Random(f"{folder.name} {seed}").shuffle(records)
        for number in range(clients_per_domain):
            own = records[number::clients_per_domain]
            tested = min(max(round(len(own) * test_share), 1), len(own) - 1)
            clients.append((f"{folder.name}-{number:0{digits}d}", own[tested:], own[:tested]))
    if not clients:
        raise InputError(f"{root}: no domain; wants one folder a domain, DOMAIN/CLASS/*.jpg")
    return clients


def broken_images(records: Sequence[ImageRecord]) -> list[str]:
    """What is wrong with each image that cannot be read, so that none is met rounds later.

    Every one is read through, by as many threads as the machine has; a JPEG at its smallest size,
    which takes all of its bytes (640 x 480: 0.5 ms on two cores). A bar shows on a terminal after
    two seconds.
    """
    with ThreadPoolExecutor() as pool:
        found = pool.map(_fault, records)
        bar = tqdm(found, "reading images", len(records), leave=False, delay=2, disable=None)
        return [fault for fault in bar if fault]


def _fault(record: ImageRecord) -> str:
    """What is wrong with an image, or nothing."""
    try:
        with _reading(record):
            if isinstance(record.image, np.ndarray):
                _from_array(record.image)
            elif isinstance(record.image, Path):
                with Image.open(record.image) as file:
                    file.draft("L", (1, 1))
                    _refuse_mode(file)
                    file.load()
            else:
                _refuse_mode(record.image)
                record.image.load()
    except InputError as error:
        return str(error)
    return ""


def pixels(records: Sequence[ImageRecord], processor: Any) -> Tensor:
    """What the model sees: float32 [B, channels, H, W].

    Images are decoded here, turned upright where their EXIF data say so, and brought to the
    processor's channels: gray is repeated, alpha dropped, 16 bits cut to 8. The checkpoint's own
    processor then resizes, rescales and normalises them.

    Raises:
        InputError: an image cannot be read; the message names it.
    """
    mode = "L" if _channels(processor) == 1 else "RGB"
    images = [_decoded(record, mode) for record in records]
    return processor(images=images, return_tensors="pt")["pixel_values"].to(torch.float32)


def _channels(processor: Any) -> int:
    """1 where the processor normalises with one mean, else 3."""
    mean = getattr(processor, "image_mean", None)
    return 1 if isinstance(mean, list | tuple) and len(mean) == 1 else 3


def _decoded(record: ImageRecord, mode: str) -> Image.Image:
    with _reading(record):
        if isinstance(record.image, Path):
            with Image.open(record.image) as file:
                return _converted(file, mode)
        if isinstance(record.image, np.ndarray):
            return _converted(_from_array(record.image), mode)
        return _converted(record.image, mode)


@contextmanager
def _reading(record: ImageRecord) -> Iterator[None]:
    """Names the record in whatever Pillow has to say about a broken image."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{record.name()}: no such image") from None
    except UnidentifiedImageError:
        raise InputError(f"{record.name()}: not an image; replace or remove the file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{record.name()}: broken image: {first_line(error)}; replace it"
        ) from None


def _converted(image: Image.Image, mode: str) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # Pillow would clip these to 255 instead of scaling them
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    _refuse_mode(upright)
    return upright.convert(mode)


def _refuse_mode(image: Image.Image) -> None:
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no fixed range; save it in 8 bits a channel")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise ValueError(f"an array of {array.dtype}, wants uint8")
    flat = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    fits = flat.ndim == 2 or (flat.ndim == 3 and flat.shape[2] in (3, 4))
    if not fits or flat.size == 0:
        raise ValueError(f"an array of shape {array.shape}, wants [H, W] or [H, W, 1, 3 or 4]")
    return Image.fromarray(np.ascontiguousarray(flat))


def _class_folders(folder: Path, category: str) -> Iterator[ImageRecord]:
    for class_folder in subfolders(folder):
        for path in sorted(class_folder.iterdir()):
            if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                yield ImageRecord(path, class_folder.name, category)


def subfolders(folder: Path) -> list[Path]:
    """Folders by name; hidden ones and those of other programs (``__MACOSX``) are passed over."""
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from None
