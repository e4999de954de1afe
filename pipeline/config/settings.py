"""Every setting of the system: its default, range, unit and meaning, and whether a run may change it.

`beitforge settings` prints this page. The sections of the run's machinery are in pipeline/config/run_settings.py.
Imports nothing heavy: help and config errors are instant. Must not know torch, shards or any stage.
"""

from dataclasses import dataclass, field
from typing import Literal

from beitforge.pipeline.config.fields import Duration, Size, setting
from beitforge.pipeline.config.run_settings import Checkpoint, Faults, Loader, Log

ONLINE = "online"
FILTERS = ("lanczos", "bicubic", "torch lanczos", "torch bicubic")  # shards.stream.loader.cut_into
_DROP_LAST = "Whether an epoch ends with its last whole global batch, as published, and leaves out what is left over."
DVAE_STRIDE = 8  # three convolutions of stride 2


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where data lies. Shard sets are folders or URLs (s3://, gs://, https://). No held-out sets: no held-out loss."""

    images: str = setting("data/images", place="shards", per_host=True, doc="Image shard set to train on.")
    tokens: str = setting(
        "data/tokens",
        place="shards",
        per_host=True,
        doc="Token shard set of the images, made by `tokenize`; `online` computes those of a fresh view each step.",
    )
    heldout_images: str = setting("", place="shards", per_host=True, doc="Image shard set for the held-out loss.")
    heldout_tokens: str = setting("", place="shards", per_host=True, doc="Token shard set of the held-out images.")
    tokenizer: str = setting(
        "data/tokenizer", place="folder", per_host=True, doc="Tokenizer folder, made by `tokenizer` or imported."
    )
    labelled_images: str = setting(
        "", place="shards", per_host=True, doc="Labelled set for fine-tuning and k-NN during the run; empty: no k-NN."
    )
    labelled_test: str = setting("", place="shards", per_host=True, doc="Labelled set that measures accuracy.")
    cache: str = setting(
        "",
        place="folder",
        per_host=True,
        doc="Node-local cache of sets behind URLs, which only its user can write; empty: one in that user's ~/.cache.",
    )
    cache_gb: float = setting(100.0, more_than=0, unit="GB", per_host=True, doc="The most the cache may hold.")
    seed: int = setting(
        0, at_least=-(2**63), less_than=2**63, doc="Seed of the data order, masks, drop path and initial weights."
    )
    bad_sample_budget: float = setting(
        1e-4,
        at_least=0,
        at_most=1,
        identity=False,
        doc="Share of bad samples not known from the sets above which a run stops.",
    )


@dataclass(frozen=True, kw_only=True)
class View:
    """How `tokenize` draws views (docs/recipe.md: BEiT's transform). A change requires new token shards."""

    num_views: int = setting(16, at_least=1, at_most=65536, doc="Number of stored views of each image.")
    seed: int = setting(0, at_least=-(2**63), less_than=2**63, doc="Seed of the views.")
    area_min: float = setting(0.08, more_than=0, at_most=1, doc="Smallest crop, as a share of the image's area.")
    area_max: float = setting(1.0, more_than=0, at_most=1, doc="Largest crop, as a share of the image's area.")
    aspect_min: float = setting(0.75, more_than=0, doc="Smallest width / height of a crop.")
    aspect_max: float = setting(4 / 3, more_than=0, doc="Largest width / height of a crop.")
    flip: float = setting(0.5, at_least=0, at_most=1, doc="Probability of a horizontal flip.")
    brightness: float = setting(0.4, at_least=0, doc="Half-width of the brightness factor's range around 1.")
    contrast: float = setting(0.4, at_least=0, doc="Half-width of the contrast factor's range around 1.")
    saturation: float = setting(0.4, at_least=0, doc="Half-width of the saturation factor's range around 1.")


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """The project's own dVAE: shape and training. The first four settings also describe an imported tokenizer."""

    input_size: Size = setting(
        Size(112, 112),
        at_least=1,
        at_most=65536,
        unit="pixels",
        doc="Input of the tokenizer; its grid is input_size / stride.",
    )
    stride: int = setting(
        8,
        at_least=1,
        at_most=4096,
        unit="pixels",
        doc="Side of a token's square: 8 for this dVAE and DALL-E's, 16 for VQ-KD.",
    )
    vocabulary: int = setting(
        8192, at_least=1, at_most=65536, hint="token ids are stored in 16 bits", doc="Number of visual tokens."
    )
    precision: str = setting(
        "fp32",
        choices=("fp32", "tf32", "fp16", "bf16"),
        identity=False,
        doc="Precision of the encoder in `tokenize` and for online tokens.",
    )
    filter: str = setting(
        "lanczos",
        choices=FILTERS,
        doc="Filter that cuts the views of a tokenizer trained here, which then carries it: Pillow's, or torch's, "
        "another arithmetic at a fifth of the time (torch lanczos: of torch 2.13 or newer).",
    )
    width: int = setting(256, at_least=1, at_most=65536, doc="Channels of the convolutions; a multiple of 4.")
    embedding: int = setting(512, at_least=1, at_most=65536, doc="Size of a codebook entry.")
    residual_blocks: int = setting(
        2, at_least=0, at_most=1024, doc="Residual blocks in the encoder, and as many in the decoder."
    )
    duration: Duration = setting(Duration(20, "epochs"), more_than=0, doc="Length of the tokenizer's training.")
    global_batch: int = setting(512, at_least=1, unit="samples", doc="Samples per optimizer step, over all processes.")
    micro_batch: int = setting(
        64, at_least=1, unit="samples", identity=False, doc="Largest micro batch of a process; the rest accumulates."
    )
    lr: float = setting(1e-3, at_least=0, doc="Peak learning rate.")
    lr_end: float = setting(1e-5, at_least=0, doc="Learning rate at the end of the cosine schedule.")
    warmup: Duration = setting(Duration(500, "steps"), at_least=0, doc="Linear warm-up of the learning rate.")
    temperature_start: float = setting(
        1.0, more_than=0, doc="Initial temperature of the Gumbel-softmax; it is annealed exponentially."
    )
    temperature_end: float = setting(0.0625, more_than=0, doc="Final temperature of the Gumbel-softmax.")
    anneal_share: float = setting(0.75, at_least=0, at_most=1, doc="Share of training that the annealing takes.")
    kl_weight: float = setting(
        1e-3, at_least=0, doc="Weight of KL(posterior ‖ uniform), warmed up over the first quarter of training."
    )
    usage_weight: float = setting(
        0.3,
        at_least=0,
        doc="Weight of KL(mean posterior of the batch ‖ uniform), which keeps the whole codebook in use.",
    )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        return self.input_size.grid(self.stride)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The encoder and its head (docs/recipe.md, "Model")."""

    input_size: Size = setting(Size(224, 224), at_least=1, at_most=65536, unit="pixels", doc="Input of the encoder.")
    patch_size: int = setting(16, at_least=1, at_most=4096, unit="pixels", doc="Side of a patch.")
    layers: int = setting(12, at_least=1, at_most=1024, doc="Number of transformer layers.")
    width: int = setting(768, at_least=1, at_most=65536, doc="Size of the hidden vectors; a multiple of heads.")
    heads: int = setting(12, at_least=1, at_most=4096, doc="Attention heads of a layer.")
    mlp_ratio: float = setting(4.0, more_than=0, at_most=256, doc="Hidden width of the MLP, as a multiple of width.")
    positions: str = setting(
        "relative_shared",
        choices=("absolute", "relative_shared", "relative"),
        doc="Position embeddings, or relative position biases shared by all layers or of each layer.",
    )
    layer_scale: bool = setting(True, doc="Whether learned factors scale the output of each residual branch.")
    layer_scale_init: float = setting(0.1, at_least=0, doc="Initial value of the layer-scale factors.")
    drop_path: float = setting(0.1, at_least=0, less_than=1, doc="Drop-path rate of the last layer, linear over depth.")
    mean: tuple[float, float, float] = setting((0.5, 0.5, 0.5), doc="Mean subtracted from RGB values in [0, 1].")
    std: tuple[float, float, float] = setting(
        (0.5, 0.5, 0.5), more_than=0, doc="Standard deviation by which RGB values are divided after that."
    )
    kernels: str = setting(
        "auto",
        choices=("auto", "fused", "sdpa", "reference"),
        identity=False,
        doc="Implementation of attention; auto uses fused on a GPU.",
    )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.input_size.grid(self.patch_size)

    @property
    def num_patches(self) -> int:
        """Patches of a view."""
        rows, columns = self.grid
        return rows * columns


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Blockwise masking (docs/recipe.md, "Mask")."""

    num_patches: int = setting(75, at_least=1, doc="Masked patches of a view.")
    min_block: int = setting(16, at_least=1, unit="patches", doc="Smallest area of a block.")
    aspect_min: float = setting(
        0.3, more_than=0, at_most=1, doc="Smallest aspect of a block, drawn log-uniformly up to 1 / aspect_min."
    )
    max_block: int = setting(
        0, at_least=0, unit="patches", doc="Largest area of a block; 0: as many as are left to mask, as published."
    )
    exact: bool = setting(True, doc="Whether exactly num_patches are masked; false: at most that many, as published.")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW or Muon with a cosine schedule per step (docs/recipe.md, "Optimiser" and "Muon")."""

    kind: str = setting(
        "adamw",
        choices=("adamw", "muon"),
        doc="Optimizer of pretraining; muon updates the matrices of the blocks, AdamW the rest.",
    )
    lr: float = setting(
        1.5e-3, at_least=0, less_than=1e38, doc="Peak learning rate; AdamW's, and Muon's updates are scaled to it."
    )
    lr_end: float = setting(1e-5, at_least=0, doc="Learning rate at the end of the cosine schedule.")
    warmup: Duration = setting(Duration(10, "epochs"), at_least=0, doc="Linear warm-up of the learning rate.")
    muon_momentum: float = setting(0.95, at_least=0, less_than=1, doc="Decay of Muon's momentum.")
    beta1: float = setting(0.9, at_least=0, less_than=1, doc="Decay of the first moment.")
    beta2: float = setting(0.999, at_least=0, less_than=1, doc="Decay of the second moment.")
    epsilon: float = setting(1e-8, at_least=0, doc="Term added to the denominator for numerical stability.")
    weight_decay: float = setting(0.05, at_least=0, doc="Decoupled weight decay.")
    weight_decay_end: float | Literal["same"] = setting(
        "same", at_least=0, doc="Weight decay at the end of a cosine over the run; same: it stays as it is."
    )
    clip_norm: float = setting(3.0, at_least=0, doc="Largest norm of the gradient; 0: no clipping, as muon needs.")

    @property
    def last_weight_decay(self) -> float:
        """weight_decay_end in numbers."""
        return self.weight_decay if self.weight_decay_end == "same" else self.weight_decay_end


@dataclass(frozen=True, kw_only=True)
class Train:
    """The pretraining run."""

    run: str = setting("runs/pretrain", place="folder", identity=False, doc="Run folder.")
    init: str = setting(
        "", place="folder", doc="Exported or imported encoder to start from; empty: weights drawn from data.seed."
    )
    duration: Duration = setting(Duration(300, "epochs"), more_than=0, doc="Length of the run.")
    drop_last: bool = setting(False, doc=_DROP_LAST)
    global_batch: int = setting(2048, at_least=1, unit="samples", doc="Samples per optimizer step, over all processes.")
    micro_batch: int = setting(
        128, at_least=1, unit="samples", identity=False, doc="Largest micro batch of a process; the rest accumulates."
    )
    precision: str = setting(
        "bf16",
        choices=("bf16", "fp16", "fp32", "fp8"),
        doc="Precision of the model's arithmetic; fp8 is bf16 with the blocks' products in FP8, by torchao.",
    )
    zero_stage: int = setting(2, choices=(0, 1, 2, 3), identity=False, doc="DeepSpeed ZeRO stage.")
    offload_optimizer: bool = setting(False, identity=False, doc="Whether optimizer state stays in host memory.")
    activation_checkpointing: str = setting(
        "none",
        choices=("none", "selective", "full"),
        before=(("false", "none"), ("true", "full")),
        identity=False,
        doc="What the backward pass recomputes to save memory: nothing, all but matrix products and attention, or all.",
    )
    compile: bool = setting(False, identity=False, doc="Whether torch.compile compiles the model.")
    compile_mode: str = setting(
        "default",
        choices=("default", "reduce-overhead"),
        identity=False,
        doc="Mode of torch.compile; reduce-overhead records CUDA graphs, for small micro batches on fast GPUs.",
    )

    @property
    def epoch_multiple(self) -> int:
        """What the number of samples of an epoch is a multiple of."""
        return self.global_batch if self.drop_last else 1

    def epoch_samples(self, samples: int) -> int:
        """How many of a set's samples an epoch takes."""
        return samples // self.epoch_multiple * self.epoch_multiple


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Supervised training on data.labelled_images (docs/recipe.md, "Fine-tuning"). Settings that are not here
    are taken from `train`, `optimizer` and `loader`."""

    run: str = setting("runs/finetune", place="folder", identity=False, doc="Run folder.")
    init: str = setting(
        "",
        place="folder",
        doc="Run folder, or exported or imported encoder or classifier; empty: weights drawn from data.seed.",
    )
    input_size: Size = setting(Size(224, 224), at_least=1, at_most=65536, unit="pixels", doc="Input of the classifier.")
    label_share: float = setting(
        1.0, more_than=0, at_most=1, doc="Share of each class's images to train on, at least one image."
    )
    duration: Duration = setting(Duration(100, "epochs"), more_than=0, doc="Length of the run.")
    drop_last: bool = setting(False, doc=_DROP_LAST)
    global_batch: int = setting(1024, at_least=1, unit="samples", doc="Samples per optimizer step, over all processes.")
    micro_batch: int = setting(
        64, at_least=1, unit="samples", identity=False, doc="Largest micro batch of a process; the rest accumulates."
    )
    lr: float = setting(4e-3, at_least=0, doc="Peak learning rate of the last layer.")
    lr_end: float = setting(1e-6, at_least=0, doc="Learning rate at the end of the cosine schedule.")
    warmup: Duration = setting(Duration(20, "epochs"), at_least=0, doc="Linear warm-up of the learning rate.")
    weight_decay: float = setting(0.05, at_least=0, doc="Decoupled weight decay.")
    weight_decay_end: float | Literal["same"] = setting(
        "same", at_least=0, doc="Weight decay at the end of a cosine over the run; same: it stays as it is."
    )
    layer_decay: float = setting(
        0.65, more_than=0, at_most=1, doc="Factor between a layer's learning rate and that of the layer above it."
    )
    clip_norm: float = setting(0.0, at_least=0, doc="Largest norm of the gradient; 0: no clipping.")
    drop_path: float = setting(0.1, at_least=0, less_than=1, doc="Drop-path rate of the last layer, linear over depth.")
    dropout: float = setting(
        0.0, at_least=0, less_than=1, doc="Dropout of the embeddings and of what attention and MLP put out."
    )
    attention_dropout: float = setting(
        0.0, at_least=0, less_than=1, doc="Dropout of attention's probabilities, for which no fused kernel is used."
    )
    pooling: str = setting(
        "mean", choices=("mean", "cls"), doc="What the head sees: the mean over the patches, or the cls token."
    )
    head_scale: float = setting(1e-3, at_least=0, doc="Scale of the new head's initial weights.")
    init_truncation: float = setting(
        1.0,
        more_than=0,
        at_most=100,
        unit="deviations",
        doc="Where the normal distribution of initial weights is cut; 100, which cuts nothing, as published.",
    )
    ema_decay: float = setting(
        0.0,
        at_least=0,
        less_than=1,
        doc="Decay of the moving average of the weights that is kept beside them; 0: none.",
    )
    area_min: float = setting(0.08, more_than=0, at_most=1, doc="Smallest crop, as a share of the image's area.")
    area_max: float = setting(1.0, more_than=0, at_most=1, doc="Largest crop, as a share of the image's area.")
    flip: float = setting(0.5, at_least=0, at_most=1, doc="Probability of a horizontal flip.")
    randaugment: str = setting("rand-m9-mstd0.5-inc1", doc="RandAugment in timm's notation; empty: none.")
    erase: float = setting(0.25, at_least=0, at_most=1, doc="Probability that a rectangle is replaced by noise.")
    mixup: float = setting(0.8, at_least=0, doc="Alpha of mixup; 0: none.")
    cutmix: float = setting(1.0, at_least=0, doc="Alpha of CutMix; 0: none.")
    smoothing: float = setting(0.1, at_least=0, less_than=1, doc="Label smoothing.")
    test_crop: float | Literal["auto"] = setting(
        "auto",
        more_than=0,
        at_most=1,
        doc="Side of the central test crop, as a share of the shorter side; auto: 0.875, and from 384 pixels on 1.",
    )
    test_every: Duration = setting(
        Duration(1, "epochs"), more_than=0, identity=False, doc="Interval between tests on data.labelled_test."
    )

    @property
    def last_weight_decay(self) -> float:
        """weight_decay_end in numbers."""
        return self.weight_decay if self.weight_decay_end == "same" else self.weight_decay_end

    @property
    def test_share(self) -> float:
        """test_crop in numbers; auto is the released code's (unilm, beit/datasets.py)."""
        return self.test_crop if self.test_crop != "auto" else 0.875 if min(self.input_size) < 384 else 1.0

    @property
    def epoch_multiple(self) -> int:
        """What the number of samples of an epoch is a multiple of."""
        return self.global_batch if self.drop_last else 1

    def epoch_samples(self, samples: int) -> int:
        """How many of a set's samples an epoch takes."""
        return samples // self.epoch_multiple * self.epoch_multiple

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration. `deepspeed` goes to DeepSpeed verbatim, over everything the rest derives."""

    data: Data = field(default_factory=Data)
    view: View = field(default_factory=View)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    model: Model = field(default_factory=Model)
    mask: Mask = field(default_factory=Mask)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    finetune: Finetune = field(default_factory=Finetune)
    loader: Loader = field(default_factory=Loader)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    faults: Faults = field(default_factory=Faults)
    log: Log = field(default_factory=Log)
    deepspeed: dict = field(default_factory=dict)
