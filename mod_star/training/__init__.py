"""Training: the pure step, the loop around it, and what a run leaves on disk.

`mod_star.training.train.train(run, directory)` is the library call, `mod_star.runs.directory.load_run(directory)`
gives a trained model back.
"""
