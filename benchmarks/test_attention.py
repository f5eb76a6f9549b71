"""Attention over packed rows, at the shapes of ViT-B/32: `pytest benchmarks/test_attention.py`."""

from benchmarks.suite import measure, shapes_of


@shapes_of("attention")
def test_attention(benchmark, problem):
    measure(benchmark, problem)
