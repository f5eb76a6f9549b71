"""Attention with one query a sequence, at the shapes of ViT-B/32: `pytest benchmarks/test_attention_pool.py`."""

from benchmarks.suite import measure, shapes_of


@shapes_of("attention_pool")
def test_attention_pool(benchmark, problem):
    measure(benchmark, problem)
