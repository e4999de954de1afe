"""What is learned, and what tokens and views do to it."""
