"""Which towers `make gpu` times, in what order, and how long it should take."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path

import pytest

from benchmarks.gpu import groups
from benchmarks.gpu.groups import B32, BFLOAT16, FLOAT16, L14, SHORT, WHOLE, Group
from clipfast.bench.peers import OURS

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def test_the_plan_is_what_is_to_be_compared():
    asked = groups.plan() + groups.more()
    dtypes, batches = (BFLOAT16, FLOAT16), (1, 32, 256, 1024)
    wanted = {Group(model, "image", b, d) for model in (B32, L14) for b in batches for d in dtypes}
    wanted |= {Group(B32, "text", b, d, captions) for captions in (SHORT, WHOLE) for b in batches for d in dtypes}
    wanted |= {Group(L14, "text", 256, d, SHORT) for d in dtypes}
    assert set(asked) == wanted and len(asked) == len(wanted)
    assert asked[:2] == [Group(B32, "image", 256, BFLOAT16), Group(B32, "text", 256, BFLOAT16, SHORT)]
    assert (SHORT.shortest, SHORT.longest, WHOLE.shortest) == (8, 24, 77)
    found = {name: [(g.model, g.tower, g.batch, g.dtype) for g in several] for name, several in groups.COMPILED.items()}
    assert found == {
        "compiled-image": [(B32, "image", 256, BFLOAT16), (B32, "image", 1, BFLOAT16)],
        "compiled-text": [(B32, "text", 256, BFLOAT16), (B32, "text", 1, BFLOAT16)],
        "compiled-l14": [(L14, "image", 256, BFLOAT16), (L14, "image", 1, BFLOAT16)],
    }
    assert all(group.compiled for several in groups.COMPILED.values() for group in several)
    assert groups.TRAIN[:4] == (B32, "train", 256, BFLOAT16)


@pytest.mark.parametrize("several", [groups.plan(), groups.more()], ids=["plan", "more"])
def test_groups_of_one_model_and_dtype_follow_each_other(several):
    keys = [key for key, _ in itertools.groupby(several, key=lambda group: (group.model, group.dtype))]
    assert len(keys) == len(set(keys))


def test_the_headline_fits_by_estimate():
    assert sum(seconds for _, seconds in groups.forecast("towers")) <= 100
    for name in ("compiled-image", "compiled-text"):
        assert sum(seconds for _, seconds in groups.forecast(name)) <= 100
    assert sum(seconds for _, seconds in groups.forecast("train")) <= 60


def test_a_forecast_names_every_group_and_what_comes_before():
    stages = {"towers": groups.plan(), "train": [groups.TRAIN]}
    stages |= {name: several[:1] for name, several in groups.COMPILED.items()}
    for name, several in stages.items():
        parts = dict(groups.forecast(name))
        assert all(parts[group.title()] == groups.estimate(group) > 0 for group in several)
        assert len(parts) == len(groups.forecast(name)) and min(parts.values()) > 0
    parts = dict(groups.forecast("towers"))
    first, second = (parts[f"{L14} {dtype}: weights, models"] for dtype in ("bfloat16", "float16"))
    assert first > second  # the weights are drawn already


def test_estimates_are_those_of_the_recorded_run():
    recorded: dict[tuple, float] = {}
    for path in RESULTS.glob("h100-80gb-hbm3-2026-11-28*.csv"):
        sums: dict[tuple, dict[str, float]] = {}
        with path.open() as file:
            for row in csv.DictReader(file):
                if row["stage"] == "towers" and row["median_s"] and not row["contestant"].endswith("compile"):
                    key = (row["model"], row["operator"].removeprefix("encode_"), int(row["batch"]), row["dtype"])
                    sums.setdefault(key, {})[row["contestant"]] = float(row["median_s"])
        for (model, tower, batch, _), medians in sums.items():
            one = sum(s for name, s in medians.items() if not name.startswith(f"{OURS},"))
            recorded[model, tower, batch] = max(one, recorded.get((model, tower, batch), 0))
    for (model, tower), known in groups.ROUND_SECONDS.items():
        for batch, seconds in known.items():
            assert math.isclose(seconds, recorded[model, tower, batch], rel_tol=0.03), (model, tower, batch)
            group = Group(model, tower, batch, BFLOAT16)
            assert groups.estimate(group) > (groups.LEAST_ROUNDS + 1 + group.warmup) * seconds
