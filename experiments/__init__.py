"""Experiments: one folder each, with its claim, command, results and figure in README.md.

Run one with `python -m experiments.NAME`.
"""
