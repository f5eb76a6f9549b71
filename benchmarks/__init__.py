"""For developers: pytest-benchmark suite, compile report, errors, the GPU run, results. For users: `clipfast bench`."""
