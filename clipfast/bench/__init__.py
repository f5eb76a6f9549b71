"""`clipfast bench`: whole models against every CLIP that is installed, checked against float64, then timed.

Built for a GPU too; `clipfast bench` itself has not yet run on one (`benchmarks.gpu` has).
"""
