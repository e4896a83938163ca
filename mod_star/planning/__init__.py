"""Plans: what a training step needs of a machine, found out by compiling it on another one."""
