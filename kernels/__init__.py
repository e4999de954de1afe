"""Tensors in, tensors out. Each kernel a folder: the public function, its reference, its fused form."""
