"""Patch embedding, of floats and of uint8, at the shapes of ViT-B/32: `pytest benchmarks/test_patch_embed.py`."""

from benchmarks.suite import measure, shapes_of


@shapes_of("patch_embed")
def test_patch_embed(benchmark, problem):
    measure(benchmark, problem)
