"""Portable weights: safetensors of our own, and the layouts of transformers, timm and unilm, each checked by loading
it back.
"""
