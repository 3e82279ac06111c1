"""Secure sums by Flower's SecAgg+: the server unmasks a sum and never sees an update.

SecAgg+ of flwr 1.42 works on the older records (FitIns, FitRes) and on arrays in an order, without
names. It weights by ``num_examples / max_weight``; equal weights make its mean a sum. Updates are
put on its grid beforehand, so its stochastic rounding finds nothing to round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.client.mod import secaggplus_mod
from flwr.clientapp.typing import ClientAppCallable
from flwr.common import Code, FitIns, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
from flwr.compat.common import recorddict_compat as compat
from flwr.server import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.serverapp import Grid
from torch import Tensor

from fedalt.flower.parcel import GRID, GRID_LIMIT, GRID_STEPS, ROUND, Parcel, of_form
from fedalt.flower.site import Site

SHARES, THRESHOLD = 1.0, 0.67
"""Of a client's key, a share with every other one; of these, the part that recovers it."""


def secure(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """A mod: SecAgg+ where the server plays it, nothing where it does not."""
    if RECORD_KEY_CONFIGS in message.content.config_records:
        return secaggplus_mod(message, context, call_next)
    return call_next(message, context)


def is_masked(message: Message) -> bool:
    """Whether a round's message has the form that SecAgg+ wants."""
    return RECORD_KEY_CONFIGS in message.content.config_records


def masked_turn(site: Site, message: Message) -> Message:
    """A site's answer in SecAgg+'s form; one that trained nothing good adds zeros to the sum."""
    order = compat.recorddict_to_fitins(message.content, keep_input=True)
    names = json.loads(str(order.config["names"]))
    arrays = parameters_to_ndarrays(order.parameters)
    sums = dict(zip(names, (torch.from_numpy(np.array(a)) for a in arrays), strict=False))
    values = json.loads(str(order.config["values"]))
    form = json.loads(str(order.config["form"]))
    answer = site.answer(ROUND, Parcel(values, {"sum": sums} if sums else {}))
    update = answer.states.get("update") or {
        name: torch.zeros(t.shape, dtype=torch.float64) for name, t in of_form(form).items()
    }
    reply = FitRes(
        Status(Code.OK, ""),
        ndarrays_to_parameters([update[name].numpy() for name in sorted(form)]),
        1,
        {"values": json.dumps(answer.values)},
    )
    return Message(compat.fitres_to_recorddict(reply, keep_input=False), reply_to=message)


def masked_sum(
    grid: Grid,
    context: Context,
    parcels: Mapping[int, Parcel],
    form: Mapping[str, Sequence[Any]],
    timeout: float,
) -> tuple[dict[str, Tensor], dict[int, Parcel]]:
    """One round of SecAgg+: the sum, fp64 on its grid, and by node what was told.

    Both are empty where too few answered to unmask anything.
    """
    strategy = _Sum(parcels, sorted(form), json.dumps(form))
    number = next(iter(parcels.values())).values["round"]
    context.state[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: number})
    context.state[MAIN_PARAMS_RECORD] = ArrayRecord()
    workflow = SecAggPlusWorkflow(
        num_shares=SHARES,
        reconstruction_threshold=THRESHOLD,
        max_weight=1.0,
        clipping_range=GRID_LIMIT,
        quantization_range=GRID_STEPS,
        timeout=timeout,
    )
    workflow(grid, LegacyContext(context, strategy=strategy, client_manager=_Manager()))
    return strategy.sums, strategy.told


@dataclass(frozen=True)
class _Proxy:
    node_id: int


class _Manager:
    def num_available(self) -> int:
        return 0


@dataclass
class _Sum:
    """What SecAgg+ asks of a strategy."""

    parcels: Mapping[int, Parcel]
    names: Sequence[str]
    form: str
    sums: dict[str, Tensor] = field(default_factory=dict)
    told: dict[int, Parcel] = field(default_factory=dict)

    def configure_fit(self, number: int, parameters: Any, manager: Any) -> list[tuple[Any, FitIns]]:
        orders = []
        for node, parcel in self.parcels.items():
            state = parcel.states.get("sum", {})
            config = {
                "values": json.dumps(parcel.values),
                "names": json.dumps(sorted(state)),
                "form": self.form,
            }
            arrays = [state[name].numpy() for name in sorted(state)]
            orders.append((_Proxy(node), FitIns(ndarrays_to_parameters(arrays), dict(config))))
        return orders

    def aggregate_fit(
        self, number: int, results: Any, failures: Any
    ) -> tuple[None, dict[str, Any]]:
        """Every result holds the mean of all: times their number, on the grid, the sum."""
        mean = parameters_to_ndarrays(results[0][1].parameters)
        for name, array in zip(self.names, mean, strict=True):
            whole = torch.from_numpy(np.array(array)) * len(results)
            self.sums[name] = (whole / GRID).round() * GRID
        for proxy, result in results:
            self.told[proxy.node_id] = Parcel(json.loads(str(result.metrics["values"])))
        return None, {}
