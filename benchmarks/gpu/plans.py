"""What a run does and how long it may take, by name; stages.py has what the names stand for. Needs no PyTorch."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
START = ("environment", "build", "ceilings")
_HEADLINE = ("gate", "towers", "compiled-image", "compiled-text")
_REST = ("correctness", "memcheck", "operators", "train", "tune")
# takes what is left, if that is enough
_LAST = "compiled-l14"
PLANS = {
    "headline": (*START, *_HEADLINE, _LAST),
    "rest": (*START, *_REST),
    "all": (*START, *_HEADLINE, *_REST, _LAST),
}
# of each plan; and the least that is not refused: the machine is looked at, and the tables are printed
MINUTES = {"headline": 5.5, "rest": 4.0, "all": 9.0}
LEAST_MINUTES = 0.5
STAGES = {
    "environment": "the machine",
    "build": "csrc, unless its library is there",
    "ceilings": "what the machine gives at best: a copy, large products",
    "gate": "graphs and every launch of the headline, against float64",
    "towers": "both towers against every peer without compilers, bfloat16 and float16",
    "compiled-image": "ViT-B/32's images against torch.compile, max-autotune",
    "compiled-text": "its texts, likewise",
    "correctness": "every kernel in every configuration, against float64",
    "memcheck": "compute-sanitizer over every kernel",
    "operators": "single operators against everybody who has them",
    "train": "a train step of ViT-B/32",
    "tune": "launch configurations, as lines for clipfast/tuning.py",
    _LAST: "ViT-L/14's images against torch.compile",
    "tests": "the tests that a GPU has something to say to, `pytest -m gpu`",
}
