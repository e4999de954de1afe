"""Images in, shards out: packing a folder, and adopting tars that somebody else made."""
