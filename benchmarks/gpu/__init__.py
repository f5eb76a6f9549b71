"""One command for a machine with a GPU: `make gpu`, or `python3 -m benchmarks.gpu`; see `__main__`."""
