"""What is measured in the time there is: which contestants of which groups, and how many rounds.

Every (group, peer) is a job with a predicted time: from the dense operations and the measured ceiling at first, then
from what the same peer took in the same tower and dtype. Cheap jobs go first, so that most rows are filled; what does
not fit is said to be out of time. The plan is made anew before each group, with the time that is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from clipfast import roofline
from clipfast.bench.peers import OPENAI, OURS, Peer

# rounds that a median needs at the least; fewer than FEW are pointed out in the row
LEAST_ROUNDS, FEW = 3, 5
# seconds that they may take, or there are fewer; and of a round beyond which the check is the first of them
LEAST_SECONDS, QUICK_ROUND = 20.0, 2.0
# of a machine's best product, what a model that nobody has timed yet is supposed to reach
FIRST_GUESS = 0.3
# how much longer a model takes than another's rate says: images of ViT-L/14 by ViT-B/32's 1.0 to 2.1 times as long
OTHER_MODEL = 1.4
# float64 on a CPU, as a share of the float32 ceiling
DOUBLE = 0.2
# seconds of building one peer's model, for each parameter: an AMD EPYC's two cores, 2026-11-22, into fresh memory
BUILD = 3e-9
# where a compiler is first asked: the largest batch of which a call takes less than this
COMPILE_SECONDS = 3.0
# as how much of its time a job counts: one row of a compiler in each model and dtype before the long ones of those who
# need no preparation, its others last
FIRST, COMPILED, LATER = 0.1, 0.05, 4.0


class Group(NamedTuple):
    """What is compared: everything that its rows share.   captions: as text."""

    model: str
    dtype: str
    tower: str
    batch: int
    captions: str

    def title(self, mean_length: float | None = None) -> str:
        mean = "" if mean_length is None else f" (mean {mean_length:g})"
        captions = f", captions of {self.captions} tokens{mean}" if self.tower != "image" else ""
        return f"{self.model} {self.tower}, {self.dtype}, batch {self.batch}{captions}"


class Costs:
    """Predicted seconds, from what has been seen so far."""

    def __init__(self, ceilings: Mapping[str, float], architectures: Mapping[str, Mapping[str, Any]]):
        self.ceilings, self.architectures = ceilings, architectures
        self._rates: dict[tuple[str, str, str], float] = {}  # (peer, dtype, tower) -> dense FLOP/s
        self._timed: set[tuple[str, str, str, str]] = set()  # (peer, model, dtype, tower)
        self._prepares: dict[str, float] = {}  # peer -> seconds a layer

    def flops(self, group: Group) -> float:
        # the logits' square is left out: it is nothing beside the towers
        return group.batch * roofline.dense_flops(self.architectures[group.model], group.tower)

    def layers(self, group: Group) -> int:
        sizes = self.architectures[group.model]
        vision = sizes["vision_layers"]
        towers = {"image": vision if isinstance(vision, int) else sum(vision), "text": sizes["transformer_layers"]}
        return towers.get(group.tower) or sum(towers.values())

    def call(self, group: Group, peer: str) -> float:
        """One call of each of the peer's contestants."""
        known = self._rates.get((peer, group.dtype, group.tower))
        if known is not None:
            return self.flops(group) / known * (1.0 if (peer, *group[:3]) in self._timed else OTHER_MODEL)
        contestants = 2 if peer == "transformers" and group.tower == "text" else 1
        return contestants * self.flops(group) / (FIRST_GUESS * self.ceilings[group.dtype])

    def prepare(self, group: Group, peer: Peer) -> float:
        """Compiling or converting for this group."""
        return self._prepares.get(peer.name, peer.prepares) * self.layers(group)

    def learn(self, group: Group, peer: str, seconds: float) -> None:
        self._rates[peer, group.dtype, group.tower] = self.flops(group) / max(seconds, 1e-9)
        self._timed.add((peer, *group[:3]))

    def timed(self, group: Group, peer: str) -> set[str]:
        """The towers in which the peer was timed in this model and dtype, in a batch of any size."""
        return {tower for name, model, dtype, tower in self._timed if (name, model, dtype) == (peer, *group[:2])}

    def learn_prepare(self, group: Group, peer: str, seconds: float) -> None:
        self._prepares[peer] = seconds / self.layers(group)

    def start(self, model: str, dtype: str, peers: int) -> float:
        """Drawing the weights and building everybody's model."""
        sizes = self.architectures[model]
        # three parameters in four are in the blocks: 12 W^2 each
        width, text_width = sizes["vision_width"], sizes["transformer_width"]
        layers = sizes["vision_layers"] if isinstance(sizes["vision_layers"], int) else 12
        parameters = 12 * (layers * width**2 + sizes["transformer_layers"] * text_width**2)
        parameters += sizes["vocab_size"] * text_width
        return BUILD * parameters * (2 + peers)

    def exact(self, group: Group, samples: int) -> float:
        """The float64 answer of so many samples."""
        reference = self.ceilings.get("float32", min(self.ceilings.values()))
        return self.flops(group) / group.batch * samples / (DOUBLE * reference)


class Rounds(NamedTuple):
    """How many at the most, and at batch 1, where a tail is wanted too; and the seconds that they may take."""

    most: int
    tail: int
    share: float

    def at(self, batch: int) -> int:
        return max(self.most, self.tail) if batch == 1 else self.most


class Calls(NamedTuple):
    """Of each contestant of a group.   least: rounds that are made even if they are late."""

    rounds: int
    least: int
    check_counts: bool  # the check is the first round

    @property
    def all(self) -> int:
        """With the check and the round of warm-up, where they do not count."""
        return self.rounds + 2 * (not self.check_counts)


def calls_of(group: Group, peers: Iterable[Peer], costs: Costs, rounds: Rounds) -> Calls:
    """As many rounds as fit into the seconds with everybody who needs no preparation, from the least to the most."""
    one = sum(costs.call(group, peer.name) for peer in peers if not peer.prepares)
    most = rounds.at(group.batch)
    least = min(most, LEAST_ROUNDS if LEAST_ROUNDS * one <= LEAST_SECONDS else max(1, int(LEAST_SECONDS / one)))
    fit = most if most * one <= rounds.share else int(rounds.share / one)
    return Calls(max(least, fit), least, one > QUICK_ROUND)


class Job(NamedTuple):
    group: Group
    peers: tuple[Peer, ...]
    seconds: float
    weight: float  # above 1: later than its time alone would put it
    base: bool = False  # the group's first, without which the others are not asked


def jobs(groups: Sequence[Group], peers: Sequence[Peer], costs: Costs, rounds: Rounds) -> Iterable[Job]:
    """The first of each group is ours with openai-clip: a row that is compared with nobody says nothing."""
    for group in groups:
        able = [peer for peer in peers if group.dtype in peer.dtypes]
        calls = calls_of(group, able, costs, rounds).all
        first = tuple(peer for peer in able if peer.name in (OURS, OPENAI)) or tuple(able[:1])
        yield Job(group, first, calls * sum(costs.call(group, peer.name) for peer in first), FIRST, base=True)
        for peer in able:
            if peer in first:
                continue
            seconds = costs.prepare(group, peer) + calls * costs.call(group, peer.name)
            weight = _compiler_weight(group, groups, peer, costs) if peer.prepares else FIRST * peer.weight
            yield Job(group, (peer,), seconds, weight)


def _compiler_weight(group: Group, groups: Sequence[Group], peer: Peer, costs: Costs) -> float:
    """One row of each model and dtype comes before the other tower's, and both before further batch sizes."""
    same = [other for other in groups if other[:2] == group[:2]]
    timed = costs.timed(group, peer.name)
    if not timed and group == _asked_first(same, peer, costs):
        return peer.weight * COMPILED
    same = [other for other in same if other.tower == group.tower]
    first = group.tower not in timed and group == _asked_first(same, peer, costs)
    return peer.weight if first else peer.weight * LATER


def _asked_first(groups: Sequence[Group], peer: Peer, costs: Costs) -> Group:
    """The first of the largest batch of which a call is quick, or else of the smallest."""
    quick = [group for group in groups if costs.call(group, peer.name) <= COMPILE_SECONDS]
    return max(quick, key=lambda group: group.batch, default=min(groups, key=lambda group: group.batch))


def choose(
    groups: Sequence[Group], peers: Sequence[Peer], costs: Costs, rounds: Rounds, seconds: float
) -> dict[Group, list[str]]:
    """The peers of each group that fit into `seconds` together; none for a group whose first job does not."""
    chosen: dict[Group, list[str]] = {group: [] for group in groups}
    left, missed = seconds, False
    found = list(jobs(groups, peers, costs, rounds))
    bases = {job.group: job.seconds * job.weight for job in found if job.base}
    for job in sorted(found, key=lambda job: (max(bases[job.group], job.seconds * job.weight), not job.base)):
        # what somebody before it was short of is not for a compiler's further rows: predictions get better
        waits = missed and job.weight > COMPILED and any(peer.prepares for peer in job.peers)
        if job.seconds <= left and (job.base or chosen[job.group]) and not waits:
            chosen[job.group] += [peer.name for peer in job.peers]
            left -= job.seconds
        else:
            missed = True
    order: Callable[[str], int] = [peer.name for peer in peers].index
    return {group: sorted(names, key=order) for group, names in chosen.items()}
