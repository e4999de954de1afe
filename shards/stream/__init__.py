"""Shards in, batches out: random access, the order of samples, views, and the loader."""
