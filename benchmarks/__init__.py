"""One script a question; each checks correctness first, then writes results/NAME.json and renders BENCHMARKS.md."""

import tests as tests  # how the packages are found
