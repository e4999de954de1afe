"""Memory, bytes, time and cost of a training, from arithmetic. No torch."""
