"""Steps of a run done again, held against what it wrote down, and their samples shown. It changes nothing of the run."""
