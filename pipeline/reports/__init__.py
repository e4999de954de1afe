"""A run record becomes one HTML file. `assets/` is its CSS and JavaScript."""
