"""Many devices and many processes: where arrays lie, and who decides.

Import `make_mesh` and `shardings` from `mod_star.distributed.sharding`, and `decide_first` from
`mod_star.distributed.processes`. The options of commands, `MeshConfig` and `ProcessesConfig`, are in `mod_star.config`.
"""
