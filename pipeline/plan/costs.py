"""What BEiT costs, by arithmetic: parameters, operations, activation memory. The model is pipeline.model.beit's,
exactly.

Knows the settings alone, so that `plan` answers at once; tests hold it to the real model. Shape letters as in
pipeline.model.beit. Must not know torch.
"""

from dataclasses import dataclass

from beitforge.pipeline.config.settings import Model, Tokenizer

_STATISTICS = 8  # mean and 1/deviation of a LayerNorm's row, float32
_DALLE_MACS = 26.06e9  # of the DALL-E encoder at 112 px (docs/recipe.md, "Cost")
_LOGITS_AT_A_TIME = 1 << 25  # kernels.cross_entropy.operator
_CHAIN_EAGER, _CHAIN_COMPILED = 18.0, 4.0  # passes of a block beside GELU's, forward
_HOST = {"none": 1.0, "selective": 4.1, "full": 1.5}  # time of a tiny block on a CPU over that without (torch 2.13)
_LAUNCHED_EAGER, _LAUNCHED_COMPILED = (
    90,
    40,
)  # kernels of a block, forward and backward, counted in pipeline.model.blocks


@dataclass(frozen=True)
class Parameter:
    """One tensor: its name in the model, how many numbers it has, whether weight decay applies, and rows and columns of
    what Muon takes (pipeline.training.optim)."""

    name: str
    numbers: int
    decays: bool
    matrix: tuple[int, int] | None = None


def parameters(model: Model, vocabulary: int) -> list[Parameter]:
    """Every parameter in the order of `Beit(...).named_parameters()`, which is also that of DeepSpeed's groups."""
    d, h = model.width, int(model.width * model.mlp_ratio)
    rows, columns = model.grid
    table = ((2 * rows - 1) * (2 * columns - 1) + 3) * model.heads
    matrices = {
        "attention.qkv_weight": (3 * d, d),
        "attention.out.weight": (d, d),
        "fc1.weight": (h, d),
        "fc2.weight": (d, h),
    }
    block = [
        *([("gamma1", d, False), ("gamma2", d, False)] if model.layer_scale else []),
        ("norm1.weight", d, False),
        ("norm1.bias", d, False),
        ("attention.qkv_weight", 3 * d * d, True),
        ("attention.q_bias", d, False),
        ("attention.v_bias", d, False),
        *([("attention.own_bias.table", table, True)] if model.positions == "relative" else []),
        ("attention.out.weight", d * d, True),
        ("attention.out.bias", d, False),
        ("norm2.weight", d, False),
        ("norm2.bias", d, False),
        ("fc1.weight", h * d, True),
        ("fc1.bias", h, False),
        ("fc2.weight", d * h, True),
        ("fc2.bias", d, False),
    ]
    embedding = [("cls_embedding", d, False), ("mask_embedding", d, True)]
    if model.positions == "absolute":
        embedding.append(("position_embedding", (model.num_patches + 1) * d, False))
    embedding += [
        ("patch_embedding.weight", 3 * model.patch_size**2 * d, True),
        ("patch_embedding.bias", d, False),
    ]
    if model.positions == "relative_shared":
        embedding.append(("shared_bias.table", table, True))
    head = [("norm.weight", d, False), ("norm.bias", d, False)]
    head += [("head.weight", vocabulary * d, True), ("head.bias", vocabulary, False)]
    blocks = [
        Parameter(f"blocks.{layer}.{n}", s, w, matrices.get(n)) for layer in range(model.layers) for n, s, w in block
    ]
    return [*(Parameter(*each) for each in embedding), *blocks, *(Parameter(*each) for each in head)]


def num_parameters(model: Model, vocabulary: int) -> int:
    """Number of trainable parameters."""
    return sum(each.numbers for each in parameters(model, vocabulary))


def _block_macs(model: Model, positions: int, picked: int) -> float:
    """Multiply-adds of a block whose output is wanted at `picked` of its positions; attention is for all of them."""
    d, h = model.width, int(model.width * model.mlp_ratio)
    return positions * 3 * d * d + 2 * positions * positions * d + picked * (d * d + 2 * d * h)


def training_flops(model: Model, vocabulary: int, masked: int) -> float:
    """Operations of one training step per image: forward × 3, matrix products only (docs/recipe.md, "Cost").

    The last block counts in full although only its masked patches are computed, so that MFU compares with others'.
    """
    s, d = model.num_patches + 1, model.width
    macs = model.layers * _block_macs(model, s, s) + model.num_patches * 3 * model.patch_size**2 * d
    return 6.0 * (macs + masked * d * vocabulary)


def computed_flops(model: Model, vocabulary: int, masked: int, checkpointing: str) -> float:
    """What a step really computes per image: the last block at masked patches alone behind its attention, fused
    attention's two products more (seven backward, not five: kernels.attention), with full checkpointing each block
    twice."""
    s, d = model.num_patches + 1, model.width
    blocks = (model.layers - 1) * _block_macs(model, s, s) + _block_macs(model, s, masked)
    outside = model.num_patches * 3 * model.patch_size**2 * d + masked * d * vocabulary
    again = model.layers * 2 * 2 * s * s * d
    return 6.0 * (blocks + outside) + again + (2.0 * blocks if checkpointing == "full" else 0.0)


@dataclass(frozen=True)
class Activations:
    """Bytes: kept per image between forward and backward, what one block holds more while its backward runs, and what
    does not grow with the images."""

    per_image: float
    working: float
    fixed: float


def activations(
    model: Model, vocabulary: int, masked: int, number: int, checkpointing: str, kernels: str
) -> Activations:
    """Tensors that autograd keeps for backward, counted in pipeline.model.blocks. `number`: bytes of one number.
    kernels:

    fused: attention keeps qkv, its output and a number a row (kernels.attention), the head its gradient alone. sdpa:
    the gradient of the bias is made for each image, and logits are kept. reference: the S × S softmax is kept, too.
    Full checkpointing (arXiv 1604.06174, a segment a block) keeps each block's input, selective also what its products
    and fused attention give (arXiv 2205.05198, section 5); one block is whole while it is computed again.
    """
    s, m, d, h = model.num_patches + 1, masked, model.width, int(model.width * model.mlp_ratio)
    matrices = model.heads * s * s * number
    kept = matrices if kernels == "reference" else 0.0
    last = _block_bytes(model, s, m, number) + kept
    full = _block_bytes(model, s, s, number) + kept
    head = m * (2 * d * number + _STATISTICS)
    if kernels == "fused":
        head += m * (d * number + 12)  # the gradient of the head's input is made with the loss
        fixed = 4.0 * vocabulary * (d + 1) + _LOGITS_AT_A_TIME * number
    else:
        head += m * vocabulary * (4 if number == 4 else 4 + number) + 8 * m
        fixed = 0.0
    bias = 4.0 * model.heads * s * s * (model.layers if model.positions == "relative" else 1)
    fixed += 0.0 if model.positions == "absolute" else 2 * bias
    embed = model.num_patches * (3 * model.patch_size**2 * number + 1) + 8 * m
    gradients = number * s * (2 * h + 3 * d) + (0 if kernels == "fused" else matrices)
    if checkpointing == "full":
        return Activations(model.layers * s * d * number + embed + head, max(full, last) + gradients, fixed)
    if checkpointing == "selective":
        attended = 0.0 if kernels == "reference" else s * (d * number + 4 * model.heads)
        wide, narrow = s * 4 * d * number + attended, (2 * d + h) * number
        again = max(full - wide - s * narrow, last - wide - m * narrow)
        blocks = model.layers * wide + ((model.layers - 1) * s + m) * narrow
        return Activations(blocks + embed + head, again + gradients, fixed)
    return Activations((model.layers - 1) * full + last + embed + head, gradients, fixed)


def _block_bytes(model: Model, s: int, m: int, number: int) -> float:
    """Kept by a block on s positions whose output is wanted at m of them."""
    d, h = model.width, int(model.width * model.mlp_ratio)
    wide = s * (
        d * (1 + 1 + 3 + 1) * number + _STATISTICS + 4 * model.heads
    )  # norm1's input and output, qkv, attention
    picked = 0 if m == s else d * number  # the rows gathered for the output matrix
    scaled = 2 * d if model.layer_scale else 0
    narrow = m * ((2 * d + 2 * h + scaled) * number + picked + _STATISTICS)  # norm2's input and output, GELU's, γ's
    return wide + narrow


def moved_bytes(model: Model, number: int, compiled: bool, kernels: str, checkpointing: str) -> float:
    """Bytes per image through the chip's memory beside the matrix products, forward and backward.

    In passes over [S, D] (the MLP's hidden layer is mlp_ratio of them): forward and eager two norms 4, two residuals 6,
    layer scale and drop path 8, GELU 2 × mlp_ratio; compiled 4 of the first three are left. Backward moves twice as
    much. Attention: qkv in and out once forward, four times backward; sdpa writes and reads the gradient of the bias
    for each image; reference moves S × S matrices: product, bias, softmax and cast, 24 bytes forward and 48 backward a
    number. Full checkpointing repeats all of a forward pass, selective its rows.
    """
    s, d = model.num_patches + 1, model.width
    passes = (_CHAIN_COMPILED if compiled else _CHAIN_EAGER) + 2 * model.mlp_ratio
    rows = 3 * passes * s * d * number
    matrix = {"fused": 0.0, "sdpa": 2.0 * number, "reference": 72.0}[kernels] * model.heads * s * s
    attended = matrix + (0.0 if kernels == "reference" else 20.0 * s * d * number)
    rows *= 1 if checkpointing == "none" else 4 / 3
    return model.layers * (rows + attended * (4 / 3 if checkpointing == "full" else 1))


def launches(model: Model, compiled: bool, checkpointing: str) -> float:
    """Kernels that a micro batch starts, forward and backward; with checkpointing the host's time for them, in kernels:
    torch's selective contexts pass every operator through Python, twice."""
    host = 1.0 if compiled else _HOST[checkpointing]
    return model.layers * (_LAUNCHED_COMPILED if compiled else _LAUNCHED_EAGER) * host


def update_bytes(numbers: float) -> float:
    """Bytes AdamW moves per parameter of its share: gradient, master and two moments in, the last three and a 16-bit
    weight out."""
    return numbers * (4 * 4 + 3 * 4 + 2)


def muon_flops(rows: int, columns: int) -> float:
    """Operations of Muon's update of a matrix: products of five Newton-Schulz steps, on the small square matrix X·Xᵀ
    with one restart where it is not square itself (deepspeed/runtime/zero/muon/original_muon.py, "gram")."""
    small, large = min(rows, columns), max(rows, columns)
    return 30.0 * small**3 if small == large else 8.0 * small**2 * large + 28.0 * small**3


def muon_bytes(numbers: float) -> float:
    """Bytes Muon moves per parameter of its share beside its products: gradient, master and momentum in, momentum into
    its stage and out of it, master and a 16-bit weight out."""
    return numbers * (3 * 4 + 3 * 4 + 4 + 2)


def tokenizer_macs(settings: Tokenizer, dalle: bool) -> float:
    """Multiply-adds of a view's tokens: the own encoder (pipeline.tokenizers.dvae), or DALL-E's (docs/recipe.md,
    "Cost")."""
    height, width = settings.input_size
    if dalle:
        return _DALLE_MACS * height * width / 112**2
    w, area = settings.width, height * width
    down = area / 4 * 3 * 16 * w / 4 + area / 16 * 16 * (w / 4) * (w / 2) + area / 64 * 16 * (w / 2) * w
    return down + area / 64 * (settings.residual_blocks * 10 * w * w + w * settings.vocabulary)
