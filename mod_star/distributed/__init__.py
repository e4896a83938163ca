"""Many devices and many processes: where arrays lie, and who decides.

Import `make_mesh` and `shardings` from `mod_star.distributed.sharding`, `decide_first` from
`mod_star.distributed.processes`, and the options of commands from `mod_star.distributed.options`, without JAX.
"""
