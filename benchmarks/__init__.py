"""Benchmarks of clipfast against openai/CLIP and the other peers: `python -m benchmarks.models`."""
