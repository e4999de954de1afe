"""`watch RUN`: a run while it goes."""
