"""The corpus of damaged shard sets that benchmarks/faults/faults.py and tests/shards/test_faults.py judge the reader
by."""
