"""The fused kernels, compiled ahead of time for chips that are not here: registers, spills and shared memory."""
