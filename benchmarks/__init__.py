"""One script a question; each checks correctness first, then writes results/NAME.json and renders BENCHMARKS.md."""
