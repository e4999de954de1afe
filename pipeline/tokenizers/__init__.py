"""Images to visual tokens and back: our dVAE, DALL-E's, VQ-KD. One contract (`storage.VisualTokenizer`), one folder
format with a fingerprint.
"""
