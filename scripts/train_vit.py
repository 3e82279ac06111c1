"""Train the tiny vision transformer of the digits federation on the public digits.

    python scripts/train_vit.py --out fedalt/assets/vit

The public images are seen upright and white on black only, moved by up to a pixel and with their
contrast varied a little, so that the clients' domains stay to be learned. Training counts steps and
not seconds: the same seed, steps and number of threads give the same model on one machine.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from fedalt.config.schema import ModelConfig
from fedalt.data.digits import DIGITS, client_images, digits_clients, public_digits
from fedalt.data.images import ImageRecord, pixels
from fedalt.model.vision import load_image_base

SIDE = 8
"""Height and width of the images."""


def new_model(args: argparse.Namespace) -> ViTForImageClassification:
    """A vision transformer with fresh weights and the ten digits as classes."""
    names = [str(digit) for digit in range(DIGITS)]
    config = ViTConfig(
        image_size=SIDE,
        patch_size=2,
        num_channels=3,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        hidden_dropout_prob=args.dropout,
        id2label=dict(enumerate(names)),
        label2id={name: row for row, name in enumerate(names)},
    )
    return ViTForImageClassification(config)


def new_processor() -> ViTImageProcessorPil:
    """Images of any size to 8 x 8, and 0..255 to -1..1."""
    return ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        do_resize=True,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [B, 3, H, W] moved by -1, 0 or 1 pixel each way, black coming in, and dimmed by up to
    a third."""
    batch, _, height, width = images.shape
    framed = pad(images, (1, 1, 1, 1), value=-1.0)
    offsets = torch.randint(0, 3, (batch, 2), generator=generator).tolist()
    rows = [
        image[:, y : y + height, x : x + width]
        for image, (y, x) in zip(framed, offsets, strict=True)
    ]
    contrast = 1 - torch.rand(batch, 1, 1, 1, generator=generator) / 3
    return (torch.stack(rows) + 1) * contrast - 1


def train(
    model: ViTForImageClassification, images: Tensor, labels: Tensor, args: argparse.Namespace
) -> None:
    """Train `model` in place for `args.steps` steps of AdamW under a one-cycle schedule."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
    started = time.perf_counter()
    model.train()
    for step in range(1, args.steps + 1):
        rows = torch.randint(0, len(images), (args.batch,), generator=generator)
        logits = model(moved(images[rows], generator)).logits
        loss = cross_entropy(logits, labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            seconds = time.perf_counter() - started
            print(f"step {step}/{args.steps}  {seconds:.0f} s  loss {loss.item():.3f}", flush=True)
    model.eval()


@torch.inference_mode()
def accuracy(model: Any, processor: Any, records: list[ImageRecord]) -> float:
    """Right answers in percent."""
    answers = model(pixels(records, processor)).logits.argmax(-1).tolist()
    names = model.config.id2label
    right = sum(names[row] == record.label for row, record in zip(answers, records, strict=True))
    return 100 * right / len(records)


def write_card(scores: dict[str, float], plain: float, parameters: int, args: Any) -> None:
    """Say beside the model what it is, how it was made and what it can do."""
    settings = " ".join(
        f"--{name} {value}" for name, value in sorted(vars(args).items()) if name != "out"
    )
    lines = [
        "# The base model of the digits federation",
        "",
        f"A vision transformer of {parameters:,} parameters (8 x 8 pixels, patches of 2 x 2),",
        "trained from nothing on the 599 public images of scikit-learn's digits (Optical",
        "Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI repository); weights in",
        "float16. Made with:",
        "",
        f"    python scripts/train_vit.py --out DIR {settings}",
        "",
        f"Accuracy on the 1198 other images, unaltered: {plain:.1f} %. On the clients' test images",
        "(`digits_clients(0)`, 56 each):",
        "",
        "| client | accuracy, % |",
        "|---|---:|",
        *(f"| {name} | {score:.1f} |" for name, score in scores.items()),
    ]
    (args.out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for model and processor")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Train, save, load again, test, and write the card."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model, processor = new_model(args), new_processor()
    records = public_digits()
    labels = torch.tensor([model.config.label2id[record.label] for record in records])
    train(model, pixels(records, processor), labels, args)
    model.half().save_pretrained(args.out)
    processor.save_pretrained(args.out)
    names = sorted(model.config.label2id)
    saved, processor = load_image_base(ModelConfig(str(args.out)), names)
    plain = accuracy(saved, processor, client_images())
    print(f"{'unaltered':>12} {plain:5.1f} %")
    scores = {}
    for name, (_, test) in digits_clients(0).items():
        scores[name] = accuracy(saved, processor, test)
        print(f"{name:>12} {scores[name]:5.1f} %")
    write_card(scores, plain, model.num_parameters(), args)


if __name__ == "__main__":
    main()
