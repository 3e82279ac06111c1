"""Handwritten digits as a federation of image clients, with no download.

scikit-learn carries 1797 images of 8 x 8. A third of them is public: a base model may be trained on
it and no client holds any. The rest is dealt to eight clients. Three things set them apart from the
base and from each other:

- a *shared* shift: all clients' digits lie on their side, turned left by a quarter;
- a *domain* each: on top of that, one client's images are mirrored, another's are faded;
- *labels*: every client knows six of the ten digits, in uneven shares.

Training images are scarce (64 a client), so what the others learn of the shared shift is worth
something.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from fedalt.data.images import ImageRecord
from fedalt.errors import not_installed

TRAIN_SHARES = (20, 16, 12, 8, 5, 3)
"""Train images of a client's first, second, ... digit."""
TEST_SHARES = (17, 14, 10, 8, 4, 3)
DIGITS = 10
PUBLIC_EVERY = 3
"""Image i is public if 3 divides i, whatever the seed."""

Domain = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _noisy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    spread = rng.normal(0, 64, image.shape)
    return np.clip(np.rint(image + spread), 0, 255)


def _blurred(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every pixel becomes the mean of the 3 x 3 around it; outside is black."""
    padded = np.pad(image, 1)
    height, width = image.shape
    windows = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.mean(windows, axis=0)


DOMAINS: dict[str, Domain] = {
    "plain": lambda image, rng: image,
    "faded": lambda image, rng: image * 0.4,
    "noisy": _noisy,
    "blurred": _blurred,
    "fogged": lambda image, rng: 96 + image * 0.6,
    "shifted": lambda image, rng: np.roll(image, 1, axis=1),
    "inverted": lambda image, rng: 255 - image,
    "mirrored": lambda image, rng: np.fliplr(image),
}
"""What a client does to an image, float64 [H, W] of 0 to 255, by the client's id."""


def digits_clients(seed: int = 0) -> dict[str, tuple[list[ImageRecord], list[ImageRecord]]]:
    """The eight clients: id -> (train, test), 64 and 56 records, shuffled.

    Args:
        seed: draws which images a client gets, their order and the noise. Domains, a client's
            digits and their shares are always the same.

    Returns:
        Records with uint8 arrays [8, 8], labels "0" to "9" and the client's id as category. No
        image is held by two clients, is in train and test, or is public.

    Raises:
        InputError: scikit-learn is not installed.
    """
    images, labels = _load()
    rng = random.Random(f"digits {seed}")
    pools: dict[int, list[int]] = {digit: [] for digit in range(DIGITS)}
    for index in range(len(images)):
        if index % PUBLIC_EVERY:
            pools[int(labels[index])].append(index)
    for pool in pools.values():
        rng.shuffle(pool)
    clients = {}
    for position, name in enumerate(DOMAINS):
        noise = np.random.default_rng([seed, position])
        parts = []
        for shares in (TRAIN_SHARES, TEST_SHARES):
            drawn = [
                pools[digit].pop()
                for digit, share in zip(client_digits(position), shares, strict=True)
                for _ in range(share)
            ]
            rng.shuffle(drawn)
            parts.append(
                [ImageRecord(seen_by(name, images[i], noise), str(labels[i]), name) for i in drawn]
            )
        clients[name] = (parts[0], parts[1])
    return clients


def public_digits() -> list[ImageRecord]:
    """The 599 images that no client holds: upright, white on black, in scikit-learn's order.

    Raises:
        InputError: scikit-learn is not installed.
    """
    return [record for i, record in enumerate(_plain_records()) if i % PUBLIC_EVERY == 0]


def client_images() -> list[ImageRecord]:
    """The 1198 images that are dealt to the clients, upright and before any domain.

    Raises:
        InputError: scikit-learn is not installed.
    """
    return [record for i, record in enumerate(_plain_records()) if i % PUBLIC_EVERY]


def client_digits(position: int) -> list[int]:
    """The digits of the client at this position in ``DOMAINS``, the most frequent first."""
    return [(3 * position + place) % DIGITS for place in range(len(TRAIN_SHARES))]


def _plain_records() -> list[ImageRecord]:
    images, labels = _load()
    return [
        ImageRecord(image, str(label), "plain") for image, label in zip(images, labels, strict=True)
    ]


def seen_by(client: str, image: np.ndarray, noise: np.random.Generator) -> np.ndarray:
    """An upright image, uint8 [H, W], as the client has it: turned left, then in its domain."""
    turned = np.rot90(image).astype(np.float64)
    return np.rint(DOMAINS[client](turned, noise)).astype(np.uint8)


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [1797, 8, 8], ink white on black in 0 to 255, and labels [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise not_installed("data.path=digits", "scikit-learn", "data") from None
    data = load_digits()
    return np.rint(data.images * (255 / 16)).astype(np.uint8), data.target
