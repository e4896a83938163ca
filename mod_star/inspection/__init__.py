"""What a trained model does with a text: routes, thoughts, and how unsure it is.

Import `routes_of` from `mod_star.inspection.routes`, `thoughts_of` from `mod_star.inspection.thoughts`, and
`calibrated` from `mod_star.inspection.calibration`.
"""
