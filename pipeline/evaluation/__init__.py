"""What an encoder has learned: losses on held-out views, k-NN, probes, reconstructions, attention. Arrays, no HTML."""
