"""PCcheck beside other ways to save the same state, each measured in a process of its own; see ../README.md.

`cli`, `environment`, `plan`, `rounds`, `summary` and `table` run on the system's Python alone; `worker`, `probes`,
`state`, `picture` and the modules of `systems` on the Python that `environment` makes.
"""
