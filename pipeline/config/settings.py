"""Every setting of the system on one page; pipeline.config.loading reads them from YAML, pipeline.config.validation
checks them.

Imports nothing heavy: help and config errors are instant. Must not know torch, shards or any stage.
"""

from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Duration:
    """A length of training, written `300 epochs`, `10000 steps` or `5000000 samples`."""

    count: float
    unit: str

    def steps(self, epoch_samples: int, global_batch: int) -> int:
        """In optimizer steps of `global_batch` samples, rounded up."""
        samples = {"epochs": self.count * epoch_samples, "samples": self.count, "steps": self.count * global_batch}
        return int(-(-samples[self.unit] // global_batch))

    def __str__(self) -> str:
        return f"{self.count:.15g} {self.unit}"


class Size(NamedTuple):
    """Height and width in pixels, written `224` (square) or `224x288`."""

    height: int
    width: int

    def grid(self, stride: int) -> tuple[int, int]:
        """Rows and columns of squares of `stride` pixels."""
        return self.height // stride, self.width // stride

    def __str__(self) -> str:
        return str(self.height) if self.height == self.width else f"{self.height}x{self.width}"


ONLINE = "online"


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where things lie. Shard sets are folders or URLs (s3://, gs://, https://). No held-out sets: no held-out loss."""

    images: str = "data/images"  # image shard set to train on
    tokens: str = "data/tokens"  # its token shard set, made by `tokenize`; online: a fresh view's, inside every step
    heldout_images: str = ""
    heldout_tokens: str = ""
    tokenizer: str = "data/tokenizer"  # tokenizer folder, made by `tokenizer`
    labelled_images: str = ""  # labelled image shard sets: k-NN inside the run, fine-tuning; empty: no k-NN
    labelled_test: str = ""
    cache: str = ""  # of a node, for sets behind URLs: what was fetched; empty: a folder in $TMPDIR
    cache_gb: float = 100.0  # at most
    seed: int = 0  # order, masks, drop path, initial weights
    bad_sample_budget: float = 1e-4  # distinct bad samples as a share of the set; more stop the run


@dataclass(frozen=True, kw_only=True)
class View:
    """What `tokenize` draws views from (docs/recipe.md: BEiT's transform). A change asks for new token shards."""

    num_views: int = 16  # K, stored views of each image
    seed: int = 0
    area_min: float = 0.08  # share of the image's area
    area_max: float = 1.0
    aspect_min: float = 0.75  # width / height
    aspect_max: float = 4 / 3
    flip: float = 0.5  # probability
    brightness: float = 0.4  # half-width of the jitter factor around 1
    contrast: float = 0.4
    saturation: float = 0.4


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """The own dVAE: its shape and its training. The first four lines are also an imported tokenizer's."""

    input_size: Size = Size(112, 112)  # the token grid is input_size / stride
    stride: int = 8  # pixels a token stands for; the own dVAE's and DALL-E's is 8, VQ-KD's 16
    vocabulary: int = 8192
    precision: str = "fp32"  # of `tokenize` and of online tokens: fp32 · tf32 · fp16 · bf16
    width: int = 256  # channels of the convolutions
    embedding: int = 512  # size of a codebook entry
    residual_blocks: int = 2  # on either side
    duration: Duration = Duration(20, "epochs")
    global_batch: int = 512
    micro_batch: int = 64  # at most, per process
    lr: float = 1e-3
    lr_end: float = 1e-5
    warmup: Duration = Duration(500, "steps")
    temperature_start: float = 1.0  # of the Gumbel-softmax, annealed exponentially over `anneal_share` of training
    temperature_end: float = 0.0625
    anneal_share: float = 0.75
    kl_weight: float = 1e-3  # of KL(posterior ‖ uniform), warmed up over the first quarter
    usage_weight: float = 0.3  # of KL(mean posterior of the batch ‖ uniform): keeps the whole codebook alive

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        return self.input_size.grid(self.stride)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The encoder and its head (docs/recipe.md, "Model")."""

    input_size: Size = Size(224, 224)
    patch_size: int = 16
    layers: int = 12
    width: int = 768
    heads: int = 12
    mlp_ratio: float = 4.0
    positions: str = "relative_shared"  # absolute · relative_shared · relative
    layer_scale: bool = True
    layer_scale_init: float = 0.1
    drop_path: float = 0.1  # of the last layer, linear over depth
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of the encoder's input in [0, 1]
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    kernels: str = "auto"  # of attention: auto (fused on a GPU) · fused · sdpa · reference

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.input_size.grid(self.patch_size)

    @property
    def num_patches(self) -> int:
        rows, columns = self.grid
        return rows * columns


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Blockwise masking (docs/recipe.md, "Mask")."""

    num_patches: int = 75  # masked patches of a view
    min_block: int = 16
    aspect_min: float = 0.3  # of a block; drawn log-uniformly up to 1 / aspect_min
    exact: bool = True  # fill to exactly num_patches; false: at most that many, as published


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW with a cosine per step (docs/recipe.md, "Optimiser")."""

    lr: float = 1.5e-3
    lr_end: float = 1e-5
    warmup: Duration = Duration(10, "epochs")
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.05
    clip_norm: float = 3.0  # 0: no clipping


@dataclass(frozen=True, kw_only=True)
class Train:
    """The pretraining run."""

    run: str = "runs/pretrain"  # run folder
    init: str = ""  # exported or imported encoder to start from; empty: weights drawn from data.seed
    duration: Duration = Duration(300, "epochs")
    global_batch: int = 2048
    micro_batch: int = 128  # at most, per process; accumulation follows from it and the number of processes
    precision: str = "bf16"  # bf16 · fp16 · fp32
    zero_stage: int = 2
    offload_optimizer: bool = False  # keep optimizer state in host memory
    activation_checkpointing: bool = False
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Supervised training on data.labelled_images (docs/recipe.md, "Fine-tuning"); what is not here is as in `train`,
    `optimizer` and `loader`."""

    run: str = "runs/finetune"  # run folder
    init: str = ""  # run folder, exported or imported encoder; empty: the model section, drawn from data.seed
    input_size: Size = Size(224, 224)
    label_share: float = 1.0  # of each class's images, at least one
    duration: Duration = Duration(100, "epochs")
    global_batch: int = 1024
    micro_batch: int = 64  # at most, per process
    lr: float = 4e-3
    lr_end: float = 1e-6
    warmup: Duration = Duration(20, "epochs")
    weight_decay: float = 0.05
    layer_decay: float = 0.65  # a layer learns at so many times the rate of the one above it
    clip_norm: float = 0.0  # 0: no clipping
    drop_path: float = 0.1
    head_scale: float = 1e-3  # of the new head's initial weights
    area_min: float = 0.08  # of the random crop, as in `view`
    area_max: float = 1.0
    flip: float = 0.5
    randaugment: str = "rand-m9-mstd0.5-inc1"  # timm's words; empty: none
    erase: float = 0.25  # probability that a rectangle becomes noise
    mixup: float = 0.8  # alpha; 0: none
    cutmix: float = 1.0  # alpha; 0: none
    smoothing: float = 0.1  # of labels
    test_crop: float = 0.875  # side of the central view, as a share of the shorter side
    test_every: Duration = Duration(1, "epochs")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class Loader:
    """The stream. seed, chunk, window and lanes fix the order; workers, prefetch and decoder never change it."""

    workers: int = 8  # per process; 0 builds batches in the training process
    prefetch: int = 4  # batches each worker keeps ready
    decoder: str = "auto"  # of JPEGs: auto (the fastest installed) · nvimgcodec · simplejpeg · pillow; same pixels
    chunk: int = 64  # samples read together; 1 is the perfect shuffle, for local NVMe
    window: int = 16  # chunks' worth of samples a lane is permuted within
    lanes: int = 256


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When to save, and what to keep."""

    every: Duration = Duration(1000, "steps")
    keep: int = 3  # the newest so many
    keep_every: Duration = Duration(0, "steps")  # and for good those of every so many steps; 0: none
    asynchronous: bool = False  # write while training goes on; takes a copy of the optimizer's part in host memory


@dataclass(frozen=True, kw_only=True)
class Faults:
    """When a run goes back or ends, and what it names in the log. 0 switches each off."""

    max_skipped: int = 5  # at least 1: updates left out in a row, being not finite, before going back to a checkpoint
    max_returns: int = 3  # going back so often without a checkpoint's worth of progress between ends the run
    hang_seconds: float = 600.0  # without a step, save or evaluation a process ends; three times as long for the first
    spike: float = 10.0  # a logged loss so many deviations above the median of the last 50
    straggler: float = 1.5  # a rank's time forward, in times of the median rank's
    starved: float = 0.2  # share of its time that a rank waits for data


@dataclass(frozen=True, kw_only=True)
class Log:
    """What is measured, and how often."""

    every_steps: int = 20
    heldout_every: Duration = Duration(1000, "steps")
    heldout_samples: int = 4096  # also of the views never trained on; k-NN takes ten times as many to choose from
    evaluation_share: float = 0.05  # of the run's time that evaluations may take; those due beyond it are left out
    tensorboard: bool = True
    wandb: str = ""  # project at Weights & Biases; empty: none
    positions: bool = False  # also every sample that every rank takes, in positions/
    peak_tflops: float = 0.0  # of one device at the precision used; 0: the built-in table, no MFU where it has none


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


POSITIONS = ("absolute", "relative_shared", "relative")
PRECISIONS = ("bf16", "fp16", "fp32")
TOKENIZER_PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
KERNELS = ("auto", "fused", "sdpa", "reference")
DECODERS = ("auto", "nvimgcodec", "simplejpeg", "pillow")
UNITS = ("epochs", "steps", "samples")
DVAE_STRIDE = 8  # three convolutions of stride 2
