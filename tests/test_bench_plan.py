"""What fits into the time is measured, most rows first, and nobody runs alone."""

from __future__ import annotations

import functools

import pytest

from clipfast.architectures import ARCHITECTURES
from clipfast.bench import contest, peers, plan

from .bench_models import TINY


def costs():
    return plan.Costs({"float32": 1e12, "bfloat16": 2e12}, {"tiny": TINY, "big": ARCHITECTURES["ViT-L/14"]})


def everybody():
    found = peers.known()
    return [
        found[name] for name in ("clipfast", "openai-clip", "open_clip", "transformers", "openai-clip torch.compile")
    ]


def groups(*batches, models=("tiny", "big")):
    return [plan.Group(m, "float32", t, b, "") for m in models for t in ("image", "text") for b in batches]


ROUNDS = plan.Rounds(15, 100, 10.0)
ENDLESS = float("inf")


def total(chosen, known):
    named = {peer.name: peer for peer in everybody()}
    found = 0.0
    for group, names in chosen.items():
        calls = 1 + plan.rounds_of(group, everybody(), known, ROUNDS)
        found += sum(known.prepare(group, named[n]) + calls * known.call(group, n) for n in names)
    return found


@pytest.mark.parametrize("seconds", [0.1, 5, 60, 400])
def test_a_plan_fits_into_its_time_and_nobody_runs_alone(seconds):
    known = costs()
    chosen = plan.choose(groups(1, 8, 32), everybody(), known, ROUNDS, seconds)
    assert total(chosen, known) <= seconds
    for names in chosen.values():
        assert not names or names[:2] == ["clipfast", "openai-clip"]
    more = plan.choose(groups(1, 8, 32), everybody(), known, ROUNDS, 2 * seconds)
    assert sum(map(len, more.values())) >= sum(map(len, chosen.values()))


def test_nobody_is_asked_where_ours_does_not_fit():
    known, group = costs(), groups(8)[0]
    for peer in everybody():
        known.learn(group, peer.name, 0.01 if peer.name == "open_clip" else 1.0)
    # at least 4 calls of ours and openai-clip each; of open_clip 0.04 s would fit
    assert plan.choose([group], everybody(), known, ROUNDS._replace(share=0.0), 5.0) == {group: []}
    assert "open_clip" in plan.choose([group], everybody(), known, ROUNDS._replace(share=0.0), 8.1)[group]


def test_without_a_limit_everybody_runs():
    chosen = plan.choose(groups(1, 32), everybody(), costs(), ROUNDS._replace(share=ENDLESS), ENDLESS)
    assert all(len(names) == 5 for names in chosen.values())


def test_predictions_follow_what_was_seen():
    known, group = costs(), groups(8)[0]
    known.learn(group, "clipfast", 3.0)
    assert known.call(group, "clipfast") == pytest.approx(3.0)
    assert known.call(group._replace(batch=16), "clipfast") == pytest.approx(6.0)
    compiler = everybody()[-1]
    known.learn_prepare(group, compiler.name, 10.0)
    assert known.prepare(group, compiler) == 10.0
    assert known.prepare(group._replace(model="big"), compiler) == 10.0 / 2 * 24


def test_rounds_are_fewer_where_they_are_slow():
    known, group = costs(), groups(8)[0]
    for peer in everybody():
        known.learn(group, peer.name, 1.0)
    assert plan.rounds_of(group, everybody(), known, plan.Rounds(15, 1, 40.0)) == 10
    assert plan.rounds_of(group, everybody(), known, plan.Rounds(15, 1, 1.0)) == plan.LEAST_ROUNDS
    assert plan.rounds_of(group, everybody(), known, plan.Rounds(15, 1, 1e9)) == 15
    assert plan.rounds_of(group, everybody(), known, plan.Rounds(2, 1, 1.0)) == 2
    one = group._replace(batch=1)
    assert plan.rounds_of(one, everybody(), known, ROUNDS._replace(share=ENDLESS)) == 100


def test_rounds_stop_when_time_is_up_but_never_below_the_least():
    rows, order = {"a": {}, "b": {}}, []
    calls = {name: functools.partial(order.append, name) for name in rows}
    contest.time_accepted(calls, rows, 9, least=3, left=lambda: 0.0)
    assert rows["a"]["rounds"] == rows["b"]["rounds"] == 3
    # one round of warm-up; then nobody always runs behind the same neighbour
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
