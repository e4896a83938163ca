"""A run on disk or in a bucket: its files, how they are written without loss, and how a model is loaded from it.

Import `load_run` from `mod_star.runs.directory`, and `read_config` from `mod_star.runs.stored_config`.
"""
