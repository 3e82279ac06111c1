"""Which settings travel from a federation's server, and which a site keeps."""

import pytest

from fedalt.config import Config
from fedalt.config.owners import SITES_OWN, federation_part, site_config, site_part
from fedalt.config.settings import config_from_dict
from fedalt.errors import InputError


def test_every_setting_has_one_owner() -> None:
    config = Config()
    federation, site = federation_part(config), site_part(config)
    assert federation.keys() | site.keys() == config.flat().keys()
    assert not federation.keys() & site.keys()
    assert site.keys() == set(SITES_OWN)
    assert not any(key.startswith(("federation.", "partition.")) for key in site)


def test_both_parts_make_the_whole() -> None:
    config = config_from_dict(
        {
            "rounds": 3,
            "out": "runs/x",
            "train": {"learning_rate": 1e-3, "micro_batch": 2},
            "federation": {"away": {"ann": [1, 2]}},
            "data": {"path": "clients", "clients": ["ann"]},
        }
    )
    assert site_config(federation_part(config), site_part(config)) == config


@pytest.mark.parametrize(
    ("federation", "site", "message"),
    [
        ({}, {"train.batch_size": 4}, r"train\.batch_size is not a site's to set"),
        ({"model.path": "x"}, {}, r"model\.path is a site's to set, and came from the server"),
        ({}, {"data.paht": "x"}, r"data\.paht is not a site's to set"),
        ({"rounds": 0}, {}, "rounds must be at least 1"),
    ],
)
def test_the_others_settings_are_refused_by_name(federation, site, message) -> None:
    with pytest.raises(InputError, match=message):
        site_config(federation, site)
