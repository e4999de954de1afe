"""What a verb does: each stage reads folders and writes a folder that a manifest or marker closes.

Stages never import each other: they meet on disk, so every one can be killed, repeated and run alone.
"""
