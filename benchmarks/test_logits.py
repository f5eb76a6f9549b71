"""Cosines of all pairs, at the shapes of ViT-B/32: `pytest benchmarks/test_logits.py`."""

from benchmarks.suite import measure, shapes_of


@shapes_of("logits")
def test_logits(benchmark, problem):
    measure(benchmark, problem)
