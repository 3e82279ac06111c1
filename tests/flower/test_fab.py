"""What is written for Flower, what a site's settings may be, and what happens without Flower."""

import importlib.metadata
import subprocess
import sys
import tomllib

import pytest
import yaml

from fedalt.cli import main
from fedalt.config import load_site
from fedalt.errors import InputError
from fedalt.flower.fab import FILES
from fedalt.flower.up import write_sites
from tests.flower.loopback import small


def test_init_writes_an_app_that_names_both_apps_and_prints_the_commands(tmp_path, capsys):
    assert main(["flower", "init", str(tmp_path / "app")]) == 0
    printed = capsys.readouterr().out
    for command in ("flower-superlink", "flwr supernode register", "flwr run", "flower-supernode"):
        assert command in printed
    project = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())
    for module in project["tool"]["flwr"]["app"]["components"].values():
        path = tmp_path / "app" / (module.partition(":")[0].replace(".", "/") + ".py")
        assert " import app" in path.read_text()
    assert project["tool"]["flwr"]["app"]["config"]["registered"] is True
    assert main(["flower", "init", str(tmp_path / "app")]) == 0  # the same again


def test_init_overwrites_nothing(tmp_path, capsys):
    (tmp_path / "pyproject.toml").write_text("mine")
    assert main(["flower", "init", str(tmp_path)]) == 2
    assert "is there and another one; choose another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pyproject.toml"]
    assert len(FILES) == 4


@pytest.mark.parametrize("found", [None, "1.41.0", "2.0.0"])
def test_up_without_the_right_flower_is_one_line(tmp_path, monkeypatch, capsys, found):
    honest = importlib.metadata.version

    def version(name):
        if name == "flwr" and found is None:
            raise importlib.metadata.PackageNotFoundError
        return found if name == "flwr" else honest(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["flower", "up", str(tmp_path / "up")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"made for 1.42 of it and not {found or 'none'}, wants flwr" in error
    assert "pip install 'fedalt[flower]'" in error
    assert not (tmp_path / "up").exists()


def test_nothing_of_flower_is_imported_unless_asked():
    code = "import sys, fedalt, fedalt.cli; sys.exit('flwr' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_client_gets_settings_of_its_own_that_a_site_takes(tiny_config, tmp_path):
    sites = write_sites(small(tiny_config), tmp_path / "up")
    assert list(sites) == ["ann", "bob", "cyd"]
    for client, path in sites.items():
        own = load_site(str(path))
        assert own["data.clients"] == [client]
        assert own["out"].endswith(f"sites/{client}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": {"batch_size": 3}}, "train.batch_size is not a site's to set"),
        ({"method": "fedit"}, "method is not a site's to set"),
        ({"train": {"micro_batch": 0}}, "train.micro_batch must be at least 1"),
        ([1], "wants a mapping of settings, got list"),
    ],
)
def test_a_sites_settings_are_checked_by_name(tmp_path, content, message):
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=message):
        load_site(str(path))


def test_a_site_without_settings_is_told_what_is_missing(tmp_path):
    with pytest.raises(InputError, match="node config, site: cannot read the site's settings"):
        load_site("")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(InputError, match=r"broken\.yaml: broken YAML"):
        load_site(str(tmp_path / "broken.yaml"))
