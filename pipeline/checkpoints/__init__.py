"""DeepSpeed's files closed by a marker, and how a checkpoint of any shape goes into a run of any other."""
