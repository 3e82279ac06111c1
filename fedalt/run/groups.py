"""Who trains with whom in a round."""

from __future__ import annotations

from collections.abc import Sequence

from fedalt.config import AUTO
from fedalt.run.stage import Member, Stage

TOKENS = {"cpu": 512, "": 8192}
"""By device, the tokens of a pass behind which more of them take their time; "": any other."""
SPREAD = 1.25
"""How many times as long as the shortest mean record of a group its longest may be."""


def most_together(wanted: int | str, tokens: float, device: str) -> int:
    """How many clients go together at most, of so many tokens a batch on a kind of device.

    Args:
        wanted: ``train.together``.
    """
    if wanted == AUTO:
        return max(1, int(TOKENS.get(device, TOKENS[""]) / tokens))
    return int(wanted)


class Groups:
    """Clients that go together: of like records, alike in rank and in what they train.

    Attributes:
        most: the clients that memory holds at once, so far as it is known; None: any number.
    """

    def __init__(self, stage: Stage, most: int | None = None) -> None:
        config, self._stage, self.most = stage.config, stage, most
        self._wanted = 1 if config.trains_alone else config.train.together
        self._device = next(stage.model.parameters()).device.type
        self._lengths: dict[str, float] = {}

    def of(self, cast: Sequence[Member]) -> list[list[Member]]:
        """The members of a round in groups, of similar sizes as far as their records allow."""
        if 1 in (self._wanted, self.most):
            return [[member] for member in cast]
        stage, alike = self._stage, dict[object, list[Member]]()
        for member in cast:
            key = tuple(stage.trains(member.id)), stage.rank(member.id)
            alike.setdefault(key, []).append(member)
        groups = []
        for members in alike.values():
            members.sort(key=self._length)
            while members:
                size = self._size(members)
                groups.append(members[:size])
                del members[:size]
        return groups

    def _size(self, members: Sequence[Member]) -> int:
        """How many of the first go together."""
        lengths = [self._length(member) for member in members]
        like = sum(length <= SPREAD * lengths[0] for length in lengths)
        tokens = self._stage.config.train.batch_size * lengths[like - 1]
        most = min(most_together(self._wanted, tokens, self._device), self.most or like, like)
        return -(-like // -(-like // most))

    def _length(self, member: Member) -> float:
        """The mean length of a member's train records."""
        if member.id not in self._lengths:
            stage = self._stage
            lengths = [stage.task.length(example) for example in stage.examples(member).train]
            self._lengths[member.id] = sum(lengths) / len(lengths)
        return self._lengths[member.id]
