"""Training: the pure step, the loop around it, and the session that sets up, resumes and ends it.

Import `train` from `mod_star.training.train`, `make_train_step` from `mod_star.training.step`, and objectives from
`mod_star.training.objectives`.
"""
