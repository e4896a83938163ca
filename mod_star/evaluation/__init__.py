"""Questions with known answers, asked of a model and counted: tasks, prompts, protocols and records.

Import `load_task` from `mod_star.evaluation.tasks`, `GeneratedAnswer` from `mod_star.evaluation.generation`,
`ChoiceLikelihood` from `mod_star.evaluation.likelihood`; the adapter of lm-evaluation-harness is
`mod_star.evaluation.harness`.
"""
