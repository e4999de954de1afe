"""A training: against peers, elastic, watched, evaluated."""
