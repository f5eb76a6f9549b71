"""The second half of a block, at the shapes of ViT-B/32: `pytest benchmarks/test_mlp.py`."""

from benchmarks.suite import measure, shapes_of


@shapes_of("mlp")
def test_mlp(benchmark, problem):
    measure(benchmark, problem)
