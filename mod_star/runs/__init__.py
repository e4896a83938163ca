"""A run on disk or in a bucket: its files, how they are written without loss, and how a model is loaded from it."""
