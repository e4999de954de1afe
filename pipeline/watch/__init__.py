"""The live report of a run: a page that updates itself, or a terminal."""
