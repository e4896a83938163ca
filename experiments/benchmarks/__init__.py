"""What steps and tokens cost, measured: one module per benchmark.

Run one with `python -m experiments.benchmarks.NAME`.
"""
