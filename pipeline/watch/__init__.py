"""The report of a run as it goes on: a page that updates itself, or a terminal."""
