"""A site: one client, its data and its disk, and its answers to the federation's server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedalt.config import Config, site_config
from fedalt.data import Client, ImageRecord, load_clients
from fedalt.errors import InputError
from fedalt.flower.parcel import HELLO, Parcel, form_of
from fedalt.flower.visit import Visit, answered
from fedalt.model import frame_fingerprint, select
from fedalt.run import Stage, check_base, folder_of
from fedalt.store import claim_run_dir, sole_writer, writing
from fedalt_kernels import __version__


class Site:
    """Opened anew for every message, since Flower starts a process for each."""

    def __init__(self, own: Mapping[str, Any]) -> None:
        """
        Args:
            own: the site's settings by dotted key: ``out``, ``data.path``, ``model.path`` and what
                else a site keeps.
        """
        self._own = dict(own)

    def answer(self, kind: str, asked: Parcel) -> Parcel:
        """The answer to a message; ``refused`` in it is one line that says why there is none."""
        try:
            config = self._config(asked)
            if kind == HELLO:
                return self._hello(config, asked)
            out = claim_run_dir(config, resume=True)
            with writing(out):
                out.mkdir(parents=True, exist_ok=True)
            # A message may be posted again while the process of the first still works on it.
            with sole_writer(out, patience=config.federation.round_timeout):
                return answered(out, asked) or Visit(self._stage(config, asked), asked).answer(kind)
        except InputError as error:
            return Parcel({"refused": str(error)})

    def _config(self, asked: Parcel) -> Config:
        theirs = asked.values["version"]
        if theirs != __version__:
            raise InputError(
                f"the server runs fedalt {theirs}, this site {__version__}; install the same"
            )
        if not self._own.get("out"):
            raise InputError("out: a site keeps its client there; name a folder")
        config = site_config(asked.values["federation"], self._own)
        if config.threads:
            torch.set_num_threads(config.threads)
        if Path(config.data.path).is_dir():
            path, alone = folder_of(config.data.path)
            where = replace(config.data, path=path, clients=alone or config.data.clients)
            config = replace(config, data=where)
        return config

    def _stage(self, config: Config, asked: Parcel) -> Stage:
        check_base(config)
        stage = Stage(config, [_client(config)], asked.values["classes"])
        stage.check_training()
        return stage

    def _hello(self, config: Config, asked: Parcel) -> Parcel:
        """Who this is, and on what base; before the federation's labels are known, its own."""
        claim_run_dir(config, resume=True)
        known, labels = asked.values["classes"], set[str]()
        if config.data.kind == "image":
            parts = _client(config).read()
            records = [*parts.train, *parts.test]
            labels = {record.label for record in records if isinstance(record, ImageRecord)}
            if not known:
                return Parcel({"labels": sorted(labels)})
        for label in sorted(labels - set(known)):
            raise InputError(
                f"{config.data.name}: the federation has no label {label!r}; take its images out"
            )
        stage = self._stage(config, asked)
        (member,) = stage.known
        first = stage.first_state(member.id)
        return Parcel(
            {
                "client": member.id,
                "examples": member.examples,
                "base": stage.fingerprints["base"],
                "frame": frame_fingerprint(stage.model),
                "quantization": config.model.quantization,
                "form": form_of(select(first, *stage.sends(member.id))),
            }
        )


def _client(config: Config) -> Client:
    clients = load_clients(config.data, config.partition, config.seed)
    if len(clients) != 1:
        named = ", ".join(client.id for client in clients)
        raise InputError(
            f"{config.data.name}: a site is one client, this has {named}; name it in data.clients"
        )
    return clients[0]
