"""One verb, one file: HELP, `add_arguments(parser)`, which imports nothing heavy, and `run(arguments)`.

A verb whose work takes torch hands it to pipeline/stages. Commands meet on disk, never in memory.
"""
