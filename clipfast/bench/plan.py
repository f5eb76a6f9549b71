"""What is measured in the time there is: which contestants of which groups, and how many rounds.

Every (group, peer) is a job with a predicted time: from the dense operations and the measured ceiling at first, then
from what the same peer took in the same tower and dtype. Ours with openai-clip and the other runtimes go first, then
the peers by their rank; of each rank the cheap jobs, so that most rows are filled. What does not fit is said to be out
of time. The plan is made anew before each group, with the time that is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from clipfast import roofline
from clipfast.bench.peers import FIRST, OPENAI, OURS, Peer

# where a call takes less, a turn begins with one that is not timed: the caches were somebody else's
WARM = 0.3
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
# of starting a process and importing a library there: the same, 2026-11-30
PROCESS = 3.5
# of that and of exports, what is left since several are prepared at a time: of 27 s and 15 s, 27 s
SIDE_BY_SIDE = 0.65
# where a compiler is first asked: the largest batch of which a call takes less than this
COMPILE_SECONDS = 3.0
# as how much of its time a compiler's job counts beyond its first tower in this model and dtype, and beyond its first
# size in a tower
OTHER_TOWER, OTHER_SIZE = 2.0, 8.0
# calls of each in a turn at batch 1, where that leaves as many turns
TOGETHER, TURNS = 10, 5


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

    def __init__(
        self,
        ceilings: Mapping[str, float],
        architectures: Mapping[str, Mapping[str, Any]],
        process: float = PROCESS,
    ):
        """process: seconds of starting one for a peer; 0 where all share one."""
        self.ceilings, self.architectures, self._process = ceilings, architectures, process
        self._rates: dict[tuple[str, str, str], float] = {}  # (peer, dtype, tower) -> dense FLOP/s
        self._timed: set[tuple[str, str, str, str]] = set()  # (peer, model, dtype, tower)
        self._prepares: dict[str, float] = {}  # peer -> seconds a layer, of each size
        self._exports: dict[str, float] = {}  # the same, of each tower
        self._paid: set[tuple[str, ...]] = set()  # what was exported and started: keys of `once`

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
        """Compiling or converting for this group, without what is done once."""
        return self._prepares.get(peer.name, peer.prepares) * self.layers(group)

    def once(self, group: Group, peer: Peer) -> dict[tuple[str, ...], float]:
        """Seconds of what this group and others need and is not there yet: the peer's process and model, its export."""
        model, dtype, tower, *_ = group
        needed: dict[tuple[str, ...], float] = {
            (peer.name, model, dtype): self._process + BUILD * self._parameters(model)
        }
        if peer.exports:
            export = self._exports.get(peer.name, peer.exports) * self.layers(group)
            needed[peer.name, model, dtype, tower] = export
        share = SIDE_BY_SIDE if self._process else 1.0
        return {key: share * seconds for key, seconds in needed.items() if key not in self._paid}

    def learn(self, group: Group, peer: str, seconds: float) -> None:
        self._rates[peer, group.dtype, group.tower] = self.flops(group) / max(seconds, 1e-9)
        self._timed.add((peer, *group[:3]))

    def timed(self, group: Group, peer: str) -> set[str]:
        """The towers in which the peer was timed in this model and dtype, in a batch of any size."""
        return {tower for name, model, dtype, tower in self._timed if (name, model, dtype) == (peer, *group[:2])}

    def started(self, group: Group, peer: Peer) -> None:
        """Its process and model are there."""
        self._paid.add((peer.name, *group[:2]))

    def learn_prepare(self, group: Group, peer: Peer, seconds: float) -> None:
        """What preparing this group took, with what is done once if that was not there."""
        key = (peer.name, *group[:3])
        if peer.exports and key not in self._paid:
            self._exports[peer.name] = max(0.0, seconds - self.prepare(group, peer)) / self.layers(group)
            self._paid.add(key)
        else:
            self._prepares[peer.name] = seconds / self.layers(group)

    def start(self, model: str) -> float:
        """Drawing the weights and writing them for everybody."""
        return 4 * BUILD * self._parameters(model)

    def _parameters(self, model: str) -> float:
        sizes = self.architectures[model]
        # three parameters in four are in the blocks: 12 W^2 each
        width, text_width = sizes["vision_width"], sizes["transformer_width"]
        layers = sizes["vision_layers"] if isinstance(sizes["vision_layers"], int) else 12
        parameters = 12 * (layers * width**2 + sizes["transformer_layers"] * text_width**2)
        return parameters + sizes["vocab_size"] * text_width

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
    """Of each contestant of a group.

    least:        rounds that are made even if they are late.
    check_counts: the check is the first round.
    together:     rounds that are made in one turn.
    """

    rounds: int
    least: int
    check_counts: bool
    together: int = 1

    def all(self, call: float) -> int:
        """With the check, where it does not count, and an untimed call in each turn, where one takes `call` seconds."""
        turns = -(-self.rounds // self.together)
        return self.rounds + (not self.check_counts) + turns * (call < WARM)


def calls_of(group: Group, peers: Iterable[Peer], costs: Costs, rounds: Rounds) -> Calls:
    """As many rounds as fit into the seconds with everybody who does not compile, from the least to the most."""
    calls = [costs.call(group, peer.name) for peer in peers if not peer.compiles]
    one, warm = sum(calls), sum(call for call in calls if call < WARM)
    most = rounds.at(group.batch)
    least = min(most, LEAST_ROUNDS if LEAST_ROUNDS * one <= LEAST_SECONDS else max(1, int(LEAST_SECONDS / one)))
    # at batch 1 several share an untimed call
    each = one + warm / (TOGETHER if group.batch == 1 else 1)
    fit = most if most * each <= rounds.share else int(rounds.share / each)
    count = max(least, fit)
    together = max(1, min(TOGETHER, count // TURNS)) if group.batch == 1 else 1
    return Calls(count, least, one > QUICK_ROUND, together)


class Job(NamedTuple):
    """Of a group.

    seconds: without what is done once.
    order:   the least first.
    base:    without it nobody else is asked.
    waits:   not asked where somebody before it was short of time: predictions get better.
    """

    group: Group
    peers: tuple[Peer, ...]
    seconds: float
    order: tuple[int, float]
    base: bool = False
    waits: bool = False


def jobs(groups: Sequence[Group], peers: Sequence[Peer], costs: Costs, rounds: Rounds) -> Iterable[Job]:
    """The first of each group is ours with openai-clip: a row that is compared with nobody says nothing."""
    for group in groups:
        able = [peer for peer in peers if group.dtype in peer.dtypes]
        calls = calls_of(group, able, costs, rounds)

        def seconds(peer: Peer, group: Group = group, calls: Calls = calls) -> float:
            call = costs.call(group, peer.name)
            return costs.prepare(group, peer) + calls.all(call) * call

        first = tuple(peer for peer in able if peer.name in (OURS, OPENAI)) or tuple(able[:1])
        base = sum(seconds(peer) for peer in first)
        yield Job(group, first, base, (FIRST, base), base=True)
        for peer in able:
            if peer not in first:
                weight = _compiler_weight(group, groups, peer, costs) if peer.compiles else 1.0
                # an export may take longer than all the calls: those of other groups' openai-clip come before it
                needed = seconds(peer) + sum(costs.once(group, peer).values())
                order = (peer.rank, max(base, weight * needed))
                yield Job(group, (peer,), seconds(peer), order, waits=weight > 1)


def _compiler_weight(group: Group, groups: Sequence[Group], peer: Peer, costs: Costs) -> float:
    """One row of each model and dtype comes before the other tower's, and both before further batch sizes."""
    same = [other for other in groups if other[:2] == group[:2]]
    timed = costs.timed(group, peer.name)
    if not timed and group == _asked_first(same, peer, costs):
        return 1.0
    same = [other for other in same if other.tower == group.tower]
    first = group.tower not in timed and group == _asked_first(same, peer, costs)
    return OTHER_TOWER if first else OTHER_SIZE


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
    paid: set[tuple[str, ...]] = set()
    for job in sorted(jobs(groups, peers, costs, rounds), key=lambda job: (job.order, not job.base)):
        once = {key: took for peer in job.peers for key, took in costs.once(job.group, peer).items() if key not in paid}
        needed = job.seconds + sum(once.values())
        if needed <= left and (job.base or chosen[job.group]) and not (missed and job.waits):
            chosen[job.group] += [peer.name for peer in job.peers]
            left -= needed
            paid |= once.keys()
        else:
            missed = True
    order: Callable[[str], int] = [peer.name for peer in peers].index
    return {group: sorted(names, key=order) for group, names in chosen.items()}


def seconds(chosen: Mapping[Group, Sequence[str]], peers: Sequence[Peer], costs: Costs, rounds: Rounds) -> float:
    """Predicted, of all that is chosen."""
    total = 0.0
    once: dict[tuple[str, ...], float] = {}
    for group, names in chosen.items():
        able = [peer for peer in peers if peer.name in names]
        calls = calls_of(group, able, costs, rounds)
        for peer in able:
            call = costs.call(group, peer.name)
            total += costs.prepare(group, peer) + calls.all(call) * call
            once |= costs.once(group, peer)
    return total + sum(once.values())
