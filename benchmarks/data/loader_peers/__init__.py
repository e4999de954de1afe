"""The loaders that `loader` measures: one module each, run by `child` in a process and an environment of its own.

A module has `open_path(given, variant)`, which makes the peer's own copy of the images when it is not there and
returns its endless batches. It imports nothing of the project but `given`, `equal_work` where it decodes as we do, and
what stands in for a library that does not load. `./launch.sh setup loader_peers` makes environments from pins/NAME.txt.
"""
