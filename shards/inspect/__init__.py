"""A look at a set: verifying it, its statistics, and a simulation of how well an order mixes."""
