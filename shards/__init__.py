"""Pictures, tars, views, order, pairs, loader. Knows no model; torch is imported by the loader alone."""
