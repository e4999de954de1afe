"""Bytes, wherever they are: files of this machine, URLs, and the cache between them."""
