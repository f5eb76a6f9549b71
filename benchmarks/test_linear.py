"""Linear with its epilogues, at the shapes of ViT-B/32: `pytest benchmarks/test_linear.py`."""

from benchmarks.suite import measure, shapes_of


@shapes_of("linear")
def test_linear(benchmark, problem):
    measure(benchmark, problem)
