"""Pooled rows to embeddings, at the shapes of ViT-B/32: `pytest benchmarks/test_project.py`."""

from benchmarks.suite import measure, shapes_of


@shapes_of("project")
def test_project(benchmark, problem):
    measure(benchmark, problem)
