"""What plan says against what was measured and published."""
