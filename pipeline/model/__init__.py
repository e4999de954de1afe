"""The BEiT encoder and what it is made of: tensors in, tensors out. No data, no DeepSpeed.

Shapes: B batch · C channels · H, W pixels · N patches · S sequence (N + 1 with the class token) · D width · A heads ·
K head size · V vocabulary · M masked patches.
"""
