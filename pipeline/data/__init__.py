"""A Config becomes streams: which shards, which views, which masks, in which order.

The only place where shards meet the model's settings.
"""
