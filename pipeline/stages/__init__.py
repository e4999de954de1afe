"""One verb a file, `run(…)`. A stage may import everything below it and no other stage: stages meet only on disk."""
