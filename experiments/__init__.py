"""Experiments: one file each; its docstring says how to run it and what was measured."""
