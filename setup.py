"""Packaging of fedalt and fedalt_kernels; versions tested together are in requirements.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """The kernels' own: they work alone, and are imported by what else asks for it."""
    door = (ROOT / "fedalt_kernels" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"', door, re.M)
    assert found, "fedalt_kernels/__init__.py: has no __version__"
    return found[1]


def long_description() -> str:
    """The README without what a package index cannot show.

    An index serves no file of this repository, and takes the source from pictures with a data: URI.
    So pictures are left out, the equation says the same, and links to files become their text.
    """
    parts = (ROOT / "README.md").read_text(encoding="utf-8").split("```")
    for number in range(0, len(parts), 2):  # between the code
        words = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", parts[number])
        parts[number] = re.sub(r"\[([^]]*)\]\((?!https?:|#)[^)]*\)", r"\1", words)
    return "```".join(parts)


setup(
    name="fedalt",
    version=version(),
    description="Personalised federated fine-tuning with fused mixtures of LoRAs",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="The FedALT developers",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={"Paper": "https://arxiv.org/abs/2503.11880"},
    keywords=["federated learning", "LoRA", "personalisation", "fine-tuning", "PEFT", "Triton"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["fedalt", "fedalt.*", "fedalt_kernels", "fedalt_kernels.*"]),
    package_data={
        "fedalt": [
            "py.typed",
            "assets/base/*",
            "assets/vit/*",
            "assets/configs/*.yaml",
            "report/style.css",
            "report/script.js",
        ],
        "fedalt_kernels": ["py.typed", "triton/tuned/*.json", "triton/hopper/*.json"],
    },
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "safetensors>=0.6",
        "numpy>=1.26",
        "pillow>=10",
        "rouge-score>=0.1.2",
        "regex>=2025.10.22",
        "pyyaml>=6.0",
        "tqdm>=4.66",
        "filelock>=3.16",
    ],
    extras_require={
        "data": ["datasets>=4.0,<6", "scikit-learn>=1.4"],
        "quantized": ["bitsandbytes>=0.50", "accelerate>=1.1"],
        "serve": ["fastapi>=0.115", "uvicorn>=0.30"],
        "gguf": ["gguf>=0.17"],
        "tensorboard": ["tensorboard>=2.16"],
        "wandb": ["wandb>=0.20"],
        "mlflow": ["mlflow-skinny>=3.1", "sqlalchemy>=2.0", "alembic>=1.13"],
        "flower": ["flwr>=1.42,<1.43"],
        "privacy": ["dp-accounting>=0.6"],
        "trainer": ["accelerate>=1.1", "trl>=1.10", "datasets>=4.0,<6"],
        "triton": ["triton>=3.6; sys_platform == 'linux'"],
        "bench": ["matplotlib>=3.8", "peft>=0.18", "pytest-benchmark>=5.1"],
        "test": [
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "peft>=0.18",
            "bitsandbytes>=0.50",
            "fastapi>=0.115",
            "uvicorn>=0.30",
            "openai>=2.0",
            "gguf>=0.17",
        ],
        "lint": ["ruff>=0.14", "mypy>=1.18", "types-PyYAML", "types-tqdm"],
    },
    entry_points={"console_scripts": ["fedalt = fedalt.cli:main"]},
)
