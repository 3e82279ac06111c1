"""Packaging of fedalt and fedalt_kernels; versions tested together are in requirements.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="fedalt",
    version="0.1.0",
    description="Personalised federated fine-tuning with fused mixtures of LoRAs",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["fedalt", "fedalt.*", "fedalt_kernels", "fedalt_kernels.*"]),
    package_data={
        "fedalt": ["assets/base/*", "assets/vit/*", "report/style.css", "report/script.js"],
        "fedalt_kernels": ["triton/tuned/*.json"],
    },
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "safetensors>=0.6",
        "numpy>=1.26",
        "pillow>=10",
        "rouge-score>=0.1.2",
        "pyyaml>=6.0",
        "tqdm>=4.66",
        "filelock>=3.16",
    ],
    extras_require={
        "data": ["datasets>=4.0,<6", "scikit-learn>=1.4"],
        "quantized": ["bitsandbytes>=0.50", "accelerate>=1.1"],
        "tensorboard": ["tensorboard>=2.16"],
        "triton": ["triton>=3.6; sys_platform == 'linux'"],
        "bench": ["matplotlib>=3.8", "peft>=0.18", "pytest-benchmark>=5.1"],
        "test": ["pytest>=8.0", "pytest-xdist>=3.6", "peft>=0.18", "bitsandbytes>=0.50"],
        "lint": ["ruff>=0.14", "mypy>=1.18", "types-PyYAML", "types-tqdm"],
    },
    entry_points={"console_scripts": ["fedalt = fedalt.cli:main"]},
)
