"""Everything that draws: tables, coloured text, progress bars, pictures. Imports no JAX.

Import `routes_text` from `mod_star.views.terminal`, `plot_curves` and `plot_routes` from `mod_star.views.plots`, and
`thoughts_html` from `mod_star.views.thoughts`.
"""
