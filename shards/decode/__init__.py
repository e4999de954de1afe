"""Bytes to pixels: decoders that give the same pixels, and crops and resizes of them."""
