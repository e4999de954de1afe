"""The one call for a machine with a GPU, and the folder that carries it there."""
