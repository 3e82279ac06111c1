"""One client's turn, wherever it trains: its state in, its training, and what leaves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedalt.methods import Method, fault
from fedalt.model import State, adapter_state, load_adapter_state, select
from fedalt.run.cohort import derive_seed
from fedalt.run.stage import Member, Stage
from fedalt.training import Trainee, TrainResult, train_client, train_together


@dataclass(frozen=True)
class Turn:
    """What came of a client's turn.

    Attributes:
        trained: its whole state; ``update``: of it, what is handed in.
        optimizer: AdamW's moments, where the method keeps them.
        told: its mean loss, its steps, and ``micro_batch`` where no whole batch was run at once.
        micro_batch: the examples that memory held at once; None: a batch.
    """

    trained: State
    update: State
    optimizer: State = field(default_factory=dict)
    told: Mapping[str, float] = field(default_factory=dict)
    micro_batch: int | None = None

    def fault(self, before: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> str | None:
        """Why it cannot count, or None.

        Args:
            before: the state that it started from; ``known``: of that, what is handed in.
        """
        return fault(self.update, known) or fault(self.trained, before)


def turn(
    stage: Stage,
    member: Member,
    number: int,
    state: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    micro_batch: int | None,
    on_step: Callable[[], None] = lambda: None,
) -> Turn:
    """Train a client in round ``number``, from ``state``; the same again gives the same bits.

    Args:
        moments: AdamW's of its last turn, where the method keeps them.
        micro_batch: the examples that memory is known to hold at once.
        on_step: called after every step, for progress.

    Raises:
        UnusedLayers: of layers whose adapters no gradient reached.
    """
    config, client = stage.config, member.id
    load_adapter_state(stage.model, state)
    result = train_client(
        stage.model,
        stage.examples(member).train,
        replace(config.train, micro_batch=micro_batch),
        stage.task.loss,
        trains=stage.trains(client),
        seed=derive_seed(config.seed, number, client),
        count=stage.task.count,
        optimizer=moments if stage.method.keeps_optimizer else None,
        privacy=config.privacy,
        on_step=on_step,
    )
    return _turn(stage, client, adapter_state(stage.model), result)


def turns_together(
    stage: Stage,
    members: Sequence[Member],
    number: int,
    states: Sequence[Mapping[str, Tensor]],
    moments: Sequence[Mapping[str, Tensor]],
    on_step: Callable[[], None] = lambda: None,
) -> list[Turn]:
    """As ``turn`` of each of several clients, of one rank and training the same, in one pass.

    Raises:
        NotTogether, HiddenRows: this model's clients have to train one by one.
    """
    config, keeps = stage.config, stage.method.keeps_optimizer
    trainees = [
        Trainee(
            state,
            stage.examples(member).train,
            derive_seed(config.seed, number, member.id),
            kept if keeps else None,
        )
        for member, state, kept in zip(members, states, moments, strict=True)
    ]
    results = train_together(
        stage.model,
        trainees,
        config.train,
        stage.task.losses,
        trains=stage.trains(members[0].id),
        length=stage.task.length,
        count=stage.task.count,
        on_step=on_step,
    )
    return [
        _turn(stage, member.id, trained, result)
        for member, (trained, result) in zip(members, results, strict=True)
    ]


def _turn(stage: Stage, client: str, trained: State, result: TrainResult) -> Turn:
    told: dict[str, float] = {"loss": result.loss, "steps": result.steps}
    if result.micro_batch and result.micro_batch < stage.config.train.batch_size:
        told["micro_batch"] = result.micro_batch
    update = hand_in(trained, stage.sends(client), client)
    return Turn(trained, update, result.optimizer, told, result.micro_batch)


def hand_in(state: State, parts: tuple[str, ...], client: str) -> State:
    """All that leaves a client: the parts of its state that its method sends."""
    return select(state, *parts)


def installed(
    method: Method, own: State, used: Mapping[str, Tensor], received: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], State | None]:
    """What a client uses from now on, and what its next round starts from where that is another.

    Args:
        own: its state after training or, where it did not train, what its next round would have
            started from.
        used: what it used so far; its own where it trained.
        received: what takes the place of its own tensors.
    """
    merged = {**own, **received}
    return (used, merged) if method.keeps_local else (merged, None)
