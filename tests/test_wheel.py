"""What is shipped: the wheel alone, installed without a network, is the whole package."""

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = ("fedalt", "fedalt_kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")
VERSION = re.findall(
    r'^__version__ = "(.+)"', (ROOT / "fedalt_kernels" / "__init__.py").read_text("utf-8"), re.M
)[0]
EXTRA = re.compile(r"pip install 'fedalt\[(\w+)\]'")


def execute(*arguments, **settings):
    done = subprocess.run(
        [str(argument) for argument in arguments], capture_output=True, text=True, **settings
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, for setuptools leaves its own files beside the sources."""
    pytest.importorskip("pip", reason="this environment has no pip to build with")
    source = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=skip)
        else:
            shutil.copy(ROOT / name, source)
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    execute(sys.executable, "-m", "pip", "wheel", *offline, "-w", source / "dist", source)
    (built,) = (source / "dist").glob("fedalt-*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_every_file_of_the_packages_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    ours = [path for name in SHIPPED[:2] for path in (ROOT / name).rglob("*") if path.is_file()]
    wanted = {str(p.relative_to(ROOT)) for p in ours if "__pycache__" not in p.parts}
    assert {"fedalt/py.typed", "fedalt_kernels/py.typed", "fedalt/assets/configs/digits.yaml"} < (
        wanted
    )
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_version_is_written_in_one_place(metadata):
    assert metadata["Version"] == VERSION
    sources = [path for name in SHIPPED[:2] for path in (ROOT / name).rglob("*.py")]
    files = (*sources, ROOT / "setup.py")
    holders = [path.name for path in files if f'"{VERSION}"' in path.read_text("utf-8")]
    assert holders == ["__init__.py"]


def test_the_metadata_says_whose_it_is_and_under_what(metadata):
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "The FedALT developers"
    assert "Paper, https://arxiv.org/abs/2503.11880" in metadata.get_all("Project-URL")
    assert "federated learning" in metadata["Keywords"]
    assert "Programming Language :: Python :: 3.13" in metadata.get_all("Classifier")
    licence = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License\n                           Version 2.0, January 2004" in licence


def test_the_description_needs_no_file_of_the_repository(metadata):
    """A package index has none of them, and shows no picture that lies in the text."""
    description = metadata.get_payload()
    assert "y = W x + b" in description
    for part in description.split("```")[::2]:
        assert not re.findall(r"\]\((?!https?:|#)[^)]*\)", part)
        assert not re.findall(r"<img|!\[", part)


def test_the_wheel_alone_runs(wheel, tmp_path):
    """Of this environment only what the package depends on is seen, and nothing of its source."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    bin_ = home / ("Scripts" if os.name == "nt" else "bin")
    pip = (sys.executable, "-m", "pip", "--python", bin_ / "python")
    execute(*pip, "install", "--no-deps", "--no-index", "--quiet", wheel)
    (site,) = home.rglob("site-packages")
    # A line of a .pth file adds a folder but runs none of its .pth files: no editable install.
    needed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "needed.pth").write_text("\n".join(needed))
    bare = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    outside = tmp_path / "outside"
    outside.mkdir()

    def run(name, *arguments):
        return execute(bin_ / name, *arguments, cwd=outside, env=bare)

    for package in ("fedalt", "fedalt_kernels"):
        code = f"import {package}; print({package}.__version__, {package}.__file__)"
        version, where = run("python", "-c", code).split()
        assert version == VERSION
        assert Path(where).is_relative_to(site)
    assert run("fedalt", "--version").startswith(f"fedalt {VERSION} (Python ")
    assert "train.batch_size" in run("fedalt", "settings")
    short = ("-c", "rounds=1", "-c", "train.max_steps=1", "-c", "evaluate.max_new_tokens=1")
    short += ("-c", "threads=1", "-c", "evaluate.parts=false")
    few = ("-c", "data.clients=[stock, map]")
    assert "report: runs/sample-fedalt/report/report.html" in run("fedalt", "run", *short, *few)
    if (Path(needed[0]) / "sklearn").exists():
        few = ("-c", "data.clients=[plain, noisy]")
        assert "runs/digits-fedalt/report" in run("fedalt", "run", "digits", *short, *few)


def extras():
    """By extra, the packages that setup.py has it install."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (value,) = (k.value for k in ast.walk(tree) if getattr(k, "arg", "") == "extras_require")
    return {
        extra: {re.split(r"[^\w-]", package)[0] for package in packages}
        for extra, packages in ast.literal_eval(value).items()
    }


def test_every_error_names_a_missing_package_by_the_extra_that_has_it():
    """All go through ``errors.not_installed``, but for the kernels, which know nothing of it."""
    calls, lines = [], []
    for name in SHIPPED[:2]:
        for path in (ROOT / name).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            lines += [(path.name, line) for line in text.splitlines() if "pip install" in line]
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "not_installed":
                    calls.append(tuple(argument.value for argument in node.args[1:]))
    assert sorted(calls) == [
        ("bitsandbytes", "quantized"),
        ("datasets", "data"),
        ("dp-accounting", "privacy"),
        ("fastapi", "serve"),
        ("flwr", "flower"),
        ("gguf", "gguf"),
        ("mlflow-skinny", "mlflow"),
        ("scikit-learn", "data"),
        ("tensorboard", "tensorboard"),
        ("tensorboard", "tensorboard"),
        ("uvicorn", "serve"),
        ("wandb", "wandb"),
    ]
    assert all(package in extras()[extra] for package, extra in calls)
    assert {name for name, _ in lines} == {"errors.py", "choice.py"}
    shown = [EXTRA.search(line.replace("{extra}", "data")) for _, line in lines]
    assert all(found and found[1] in extras() for found in shown)
    ready = (ROOT / "fedalt" / "assets" / "configs").glob("*.yaml")
    lines = [line for path in ready for line in path.read_text("utf-8").splitlines()]
    named = [line for line in lines if "[data]" in line]
    assert len(named) == 5
    assert all(EXTRA.search(line) for line in named)
