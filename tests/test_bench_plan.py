"""What fits into the time is measured, most rows first, and nobody runs alone."""

from __future__ import annotations

import functools

import pytest

from clipfast.architectures import ARCHITECTURES
from clipfast.bench import contest, harness, peers, plan

from .bench_models import TINY


def costs():
    rates = {"float32": 1e12, "bfloat16": 2e12}
    return plan.Costs(rates, {"tiny": TINY, "big": ARCHITECTURES["ViT-L/14"]}, process=0.0)


def everybody():
    found = peers.known()
    return [
        found[name] for name in ("clipfast", "openai-clip", "open_clip", "transformers", "openai-clip torch.compile")
    ]


def groups(*batches, models=("tiny", "big")):
    return [plan.Group(m, "float32", t, b, "") for m in models for t in ("image", "text") for b in batches]


ROUNDS = plan.Rounds(15, 100, 10.0)
ENDLESS = float("inf")


def total(chosen, known, rounds=ROUNDS):
    named = {peer.name: peer for peer in everybody()}
    found, once = 0.0, {}
    for group, names in chosen.items():
        calls = plan.calls_of(group, everybody(), known, rounds)
        for name in names:
            call = known.call(group, name)
            found += known.prepare(group, named[name]) + calls.all(call) * call
            once |= known.once(group, named[name])
    return found + sum(once.values())


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
    known.learn_prepare(group, compiler, 10.0)
    assert known.prepare(group, compiler) == 10.0
    assert known.prepare(group._replace(model="big"), compiler) == 10.0 / 2 * 24


def test_another_models_rate_is_too_good():
    known, group = costs(), groups(8)[0]
    big = group._replace(model="big")
    known.learn(group, "clipfast", 3.0)
    rate = known.flops(group) / 3.0
    assert known.call(big, "clipfast") == pytest.approx(plan.OTHER_MODEL * known.flops(big) / rate)
    known.learn(big, "clipfast", 7.0)
    assert known.call(big._replace(batch=32), "clipfast") == pytest.approx(28.0)


def test_rounds_are_fewer_where_they_are_slow():
    known, group = costs(), groups(8)[0]
    for peer in everybody():
        known.learn(group, peer.name, 1.0)

    def rounds(most, share, group=group):
        return plan.calls_of(group, everybody(), known, plan.Rounds(*most, share)).rounds

    assert rounds((15, 1), 40.0) == 10
    assert rounds((15, 1), 1.0) == plan.LEAST_ROUNDS
    assert rounds((15, 1), 1e9) == 15
    assert rounds((2, 1), 1.0) == 2
    assert rounds((15, 100), ENDLESS, group._replace(batch=1)) == 100


@pytest.mark.parametrize(
    ("seconds", "least", "check_counts"), [(0.2, 3, False), (1.0, 3, True), (2.0, 2, True), (9.0, 1, True)]
)
def test_the_slower_the_fewer_calls_at_the_least(seconds, least, check_counts):
    known, group = costs(), groups(32)[0]
    for peer in everybody():
        known.learn(group, peer.name, seconds)
    found = plan.calls_of(group, everybody(), known, ROUNDS._replace(share=0.0))
    assert found == (least, least, check_counts, 1)
    # the check, and in a turn of a quick one a call to warm up
    assert found.all(seconds) == least + (0 if check_counts else 1) + (least if seconds < plan.WARM else 0)


def test_a_compiler_has_one_row_of_each_model_and_dtype_before_it_has_two():
    known, found = costs(), [group for group in groups(1, 8, 32) if group.model == "tiny"]
    found += [group._replace(dtype="bfloat16") for group in found]
    compiler = everybody()[-1].name
    for seconds in range(0, 400, 4):
        chosen = plan.choose(found, everybody(), known, ROUNDS._replace(share=0.0), seconds)
        rows = [group for group, names in chosen.items() if compiler in names]
        if rows:
            assert all(len(names) >= 4 for names in chosen.values()), "before everybody of a lower rank"
        if len(rows) == 2:
            assert {group.dtype for group in rows} == {"float32", "bfloat16"}
        if len(rows) == 4:
            assert len({(group.dtype, group.tower) for group in rows}) == 4
            assert all(group.batch == 32 for group in rows)


def test_a_compiler_that_has_its_row_is_not_asked_first_again():
    known, rest = costs(), groups(8, models=("tiny",))
    compiler = everybody()[-1]

    def waits():
        found = plan.jobs(rest[1:], everybody(), known, ROUNDS)
        return [(job.waits, round(job.order[1] / job.seconds, 1)) for job in found if compiler in job.peers]

    assert waits() == [(False, 1.0)]
    known.learn(rest[0], compiler.name, 0.1)
    assert waits() == [(True, plan.OTHER_TOWER)], "the first of the other tower"
    known.learn(rest[1], compiler.name, 0.1)
    assert waits() == [(True, plan.OTHER_SIZE)]


def test_who_is_left_out_first_where_time_is_short():
    """Compilers and what is quantised, transformers, open_clip; other runtimes last, and never without openai-clip."""
    known, found = costs(), groups(1, 8, 32)
    names = ("onnxruntime", "OpenVINO", "onnxruntime int8")
    asked = [*everybody(), *(peers.known()[name] for name in names)]
    few, seen = ROUNDS._replace(share=0.0), set()
    jobs = list(plan.jobs(found, asked, known, few))
    everything = plan.seconds(plan.choose(found, asked, known, few, ENDLESS), asked, known, few)

    def once(job):
        return {key: seconds for peer in job.peers for key, seconds in known.once(job.group, peer).items()}

    for part in range(1, 41):
        seconds = everything * part / 40
        chosen = plan.choose(found, asked, known, few, seconds)
        assert all("openai-clip" in names for names in chosen.values() if names)
        whole = {peer.name for peer in asked if all(peer.name in names for names in chosen.values())}
        seen.add(frozenset(whole))
        there = [job for job in jobs if job.peers[0].name in chosen[job.group] and job.order[0] == peers.FIRST]
        paid = {key: took for job in there for key, took in once(job).items()}
        left = seconds - sum(job.seconds for job in there) - sum(paid.values())
        for job in jobs:
            if job.order[0] == peers.FIRST and job not in there and chosen[job.group]:
                # the others had what was too little for it
                assert job.seconds + sum(took for key, took in once(job).items() if key not in paid) > left
    assert frozenset({"clipfast", "openai-clip", "onnxruntime", "OpenVINO"}) in seen
    assert frozenset(peer.name for peer in asked) in seen


def test_an_export_takes_no_row_of_openai_clip_away():
    known, found = costs(), groups(1, 8, models=("tiny",))
    asked = [*everybody()[:2], peers.known()["onnxruntime"]]
    few = ROUNDS._replace(share=0.0)
    for group in found:
        for peer in asked:
            known.learn(group, peer.name, 0.002 * group.batch)
    base = sum(job.seconds for job in plan.jobs(found, asked, known, few) if job.base)
    export = known.once(found[0], asked[-1])
    assert base < sum(export.values()) / 2, "else this shows nothing"
    assert all(plan.choose(found, asked, known, few, 1.1 * base).values())
    assert all(plan.choose(found, asked, known, few, 1.1 * base + sum(export.values())).values())


def test_an_export_and_a_process_are_paid_once():
    known = plan.Costs({"float32": 1e12}, {"tiny": TINY}, process=5.0)
    one, other = groups(1, 8, models=("tiny",))[:2]
    exporter = peers.known()["onnxruntime"]
    once = known.once(one, exporter)
    assert once == known.once(other, exporter)
    process, export = once.values()
    assert 5 < process / plan.SIDE_BY_SIDE < 5.1 and export == plan.SIDE_BY_SIDE * exporter.exports * 2
    group = plan.choose([one, other], [exporter], known, ROUNDS._replace(share=0.0), ENDLESS)
    calls = sum(job.seconds for job in plan.jobs([one, other], [exporter], known, ROUNDS._replace(share=0.0)))
    assert plan.seconds(group, [exporter], known, ROUNDS._replace(share=0.0)) == pytest.approx(calls + process + export)
    known.started(one, exporter)
    assert list(known.once(one, exporter).values()) == [export]
    known.learn_prepare(one, exporter, 7.0 + known.prepare(one, exporter))
    assert known.once(one, exporter) == {}
    text = one._replace(tower="text")
    assert list(known.once(text, exporter).values()) == [plan.SIDE_BY_SIDE * 7.0]
    known.learn_prepare(other, exporter, 0.5)
    assert known.prepare(one, exporter) == 0.5


def test_a_compilers_further_rows_leave_the_time_to_who_was_short_of_it():
    known, rest = costs(), groups(8, models=("tiny",))
    compiler = everybody()[-1]
    for group in rest:
        for peer in everybody():
            slow = group.tower == "image" and peer.name == "transformers"
            known.learn(group, peer.name, 19.0 if slow else 1.0)
    known.learn_prepare(rest[1], compiler, 1.0)
    few = ROUNDS._replace(share=0.0)
    seconds = total(plan.choose(rest, everybody(), known, few, ENDLESS), known, few) - 10
    chosen = plan.choose(rest, everybody(), known, few, seconds)
    assert sum("transformers" in names for names in chosen.values()) == 1
    assert not any(compiler.name in names for names in chosen.values())


def turns(functions):
    return {name: functools.partial(harness.timed, function) for name, function in functions.items()}


def test_where_calls_are_slow_the_check_is_the_first_round():
    order = []
    calls = turns({name: functools.partial(order.append, name) for name in "abc"})
    rows = {name: {} for name in calls}
    contest.time_accepted(calls, rows, 2, checked={"a": 30.0, "b": 31.0})
    # c compiled in the check
    assert "".join(order) == "c" + "abc"
    assert [row["rounds"] for row in rows.values()] == [2, 2, 2]
    assert rows["a"]["seconds"].startswith("30 ") and rows["b"]["seconds"].startswith("31 ")

    order.clear()
    contest.time_accepted(calls, rows, 1, checked={"a": 30.0, "b": 31.0})
    assert "".join(order) == "c"
    assert (rows["a"]["median_s"], rows["a"]["warning"]) == (30.0, "only 1 round")
    assert rows["c"]["status"] == "ok" and rows["c"]["rounds"] == 1


def test_who_fails_after_a_slow_check_keeps_no_time():
    def fails():
        raise MemoryError("bad_alloc")

    rows = {"a": {}, "b": {}, "c": {}}
    contest.time_accepted(turns({"a": int, "b": fails, "c": fails}), rows, 3, checked={"a": 30.0, "b": 31.0})
    assert rows["a"]["rounds"] == 3
    assert rows["b"]["status"] == rows["c"]["status"] == "out of memory"
    assert "median_s" not in rows["b"]


def test_rounds_stop_when_time_is_up_but_never_below_the_least():
    rows, order = {"a": {}, "b": {}}, []
    calls = turns({name: functools.partial(order.append, name) for name in rows})
    contest.time_accepted(calls, rows, 9, least=3, left=lambda: 0.0)
    assert rows["a"]["rounds"] == rows["b"]["rounds"] == 3
    # one round of warm-up; then nobody always runs behind the same neighbour
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"


def test_calls_of_a_turn_follow_each_other_and_none_is_left_over():
    rows, order = {"a": {}, "b": {}}, []
    calls = turns({name: functools.partial(order.append, name) for name in rows})
    contest.time_accepted(calls, rows, 5, together=2, warm_up=False)
    assert "".join(order) == "aabb" + "bbaa" + "ab"
    assert rows["a"]["rounds"] == rows["b"]["rounds"] == 5


def test_at_batch_1_a_turn_has_several_calls_if_there_are_enough():
    known, group = costs(), groups(1)[0]
    for peer in everybody():
        known.learn(group, peer.name, 0.01)
    found = plan.calls_of(group, everybody(), known, ROUNDS)
    assert found[:] == (100, 3, False, plan.TOGETHER) and found.all(0.01) == 100 + 10 + 1
    assert plan.calls_of(group, everybody(), known, plan.Rounds(15, 15, 10.0)).together == 3
    assert plan.calls_of(group._replace(batch=8), everybody(), known, ROUNDS).together == 1
