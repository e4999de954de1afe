"""Steps of a run done again, held against what it wrote down, and their samples. Nothing of the run is changed."""
