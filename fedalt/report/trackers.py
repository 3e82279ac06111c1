"""The trackers: each shows a run a client, grouped under the federation's own."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from fedalt.errors import not_installed
from fedalt.report.points import FEDERATION

PROJECT = "fedalt"
"""Where a tracker shows runs, unless its own environment variables say another place."""
MOST_METRICS = 1000
"""That MLflow takes at once."""


@dataclass
class Account:
    """What a tracker has been told of a run directory, kept from start to start.

    Attributes:
        out: the run directory.
        settings: the run's, by dotted key.
        told: the last round of which everything was told; -1: none.
        runs: by name, what the tracker calls its runs.
    """

    out: Path
    settings: Mapping[str, Any]
    told: int = -1
    runs: dict[str, str] = field(default_factory=dict)


class Tracker(Protocol):
    """Shows values by run and round. Its runs are opened by their first values."""

    def log(self, name: str, values: Mapping[str, float], number: int) -> None:
        """Show the values of round ``number`` in the run called ``name``."""

    def close(self, failed: bool) -> None:
        """Nothing more comes."""


class TensorBoard:
    """Event files in ``tensorboard/NAME`` of the run directory."""

    def __init__(self, account: Account) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise not_installed("report_to", "tensorboard", "tensorboard") from None
        self._writer, self._folder = SummaryWriter, account.out / "tensorboard"
        self._first = account.told + 1
        self._open: dict[str, Any] = {}

    def log(self, name: str, values: Mapping[str, float], number: int) -> None:
        if name not in self._open:
            folder = str(self._folder / quote(name, safe=""))
            # what a cut start wrote of this round and later ones is no longer shown
            self._open[name] = self._writer(folder, purge_step=self._first)
        for tag, value in values.items():
            self._open[name].add_scalar(tag, value, number)
        self._open[name].flush()

    def close(self, failed: bool) -> None:
        for writer in self._open.values():
            writer.close()


class Wandb:
    """Runs of one group; its steps are rounds, and a step that was told is not told again."""

    def __init__(self, account: Account) -> None:
        try:
            from wandb import Settings, init
        except ImportError:
            raise not_installed("report_to", "wandb", "wandb") from None
        self._init, self._settings = init, Settings(console="off", silent=True)
        self._account = account
        self._open: dict[str, Any] = {}

    def log(self, name: str, values: Mapping[str, float], number: int) -> None:
        if name not in self._open:
            self._open[name] = self._begin(name)
        self._open[name].log(dict(values), step=number, commit=True)

    def _begin(self, name: str) -> Any:
        runs, out = self._account.runs, self._account.out
        return self._init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=f"{out.name}-{_id_of(runs, FEDERATION)}",
            job_type=name.partition("-")[0],
            name=f"{out.name}/{name}",
            id=_id_of(runs, name),
            resume="allow",
            reinit="create_new",
            dir=str(out),
            config=dict(self._account.settings),
            settings=self._settings,
        )

    def close(self, failed: bool) -> None:
        for run in self._open.values():
            run.finish(exit_code=int(failed))


def _id_of(runs: dict[str, str], name: str) -> str:
    return runs.setdefault(name, uuid.uuid4().hex[:12])


class MLflow:
    """Child runs of the federation's run, in the experiment of ``MLFLOW_EXPERIMENT_NAME``."""

    def __init__(self, account: Account) -> None:
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric
        except ImportError:
            raise not_installed("report_to", "mlflow-skinny", "mlflow") from None
        self._connect, self._metric = MlflowClient, Metric
        self._account = account
        self._client: Any = None
        self._shown: dict[str, int] = {}  # by name, the last round that the run has

    def log(self, name: str, values: Mapping[str, float], number: int) -> None:
        self._client = self._client or self._connect()
        run = self._run(name)
        if number > self._shown[name]:
            now = round(time.time() * 1000)
            rows = {**values, "round": number}.items()
            metrics = [self._metric(tag, value, now, number) for tag, value in rows]
            for start in range(0, len(metrics), MOST_METRICS):
                self._client.log_batch(run, metrics=metrics[start : start + MOST_METRICS])
            self._shown[name] = number

    def _run(self, name: str) -> str:
        """The tracker's name of a run, which is begun or taken up if that has not been done."""
        runs = self._account.runs
        if name not in self._shown and name in runs:
            self._client.update_run(runs[name], status="RUNNING")
            rounds = [row.step for row in self._client.get_metric_history(runs[name], "round")]
            self._shown[name] = max(rounds, default=-1)
        elif name not in self._shown:
            above = {} if name == FEDERATION else {"mlflow.parentRunId": self._run(FEDERATION)}
            title = f"{self._account.out.name}/{name}"
            made = self._client.create_run(self._experiment(), run_name=title, tags=above)
            runs[name], self._shown[name] = made.info.run_id, -1
            if name == FEDERATION:
                for key, value in self._account.settings.items():
                    self._client.log_param(runs[name], key, value)
        return runs[name]

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)

    def close(self, failed: bool) -> None:
        for name in self._shown:
            state = "FAILED" if failed else "FINISHED"
            self._client.set_terminated(self._account.runs[name], state)


TRACKERS: Mapping[str, Callable[[Account], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
}
