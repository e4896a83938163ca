"""Tasks, protocols and records of `mod-star evaluate`."""
