"""LayerNorm, at the shapes of ViT-B/32: `pytest benchmarks/test_layer_norm.py`."""

from benchmarks.suite import measure, shapes_of


@shapes_of("layer_norm")
def test_layer_norm(benchmark, problem):
    measure(benchmark, problem)
