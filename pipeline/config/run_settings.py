"""The settings of a run's machinery: the stream, checkpoints, faults and logs. The others are in settings.py."""

from dataclasses import dataclass

from beitforge.pipeline.config.fields import Duration, setting


@dataclass(frozen=True, kw_only=True)
class Loader:
    """The stream. data.seed, chunk, window and lanes fix its order; workers, prefetch and decoder never change it; a
    decoder that gives other pixels than Pillow is part of a run's identity."""

    workers: int = setting(
        8,
        at_least=0,
        at_most=1024,
        per_host=True,
        doc="Worker processes per rank; 0 builds batches in the training process.",
    )
    prefetch: int = setting(
        4, at_least=1, at_most=4096, unit="batches", per_host=True, doc="Batches that each worker keeps ready."
    )
    decoder: str = setting(
        "auto",
        choices=("auto", "nvimgcodec", "simplejpeg", "pillow", "approximate", "gpu"),
        per_host=True,
        apart=("approximate", "gpu"),
        doc="JPEG decoder; auto takes the fastest installed, and all give the same pixels, but for two that are never "
        "taken by themselves: approximate (fast DCT, plain upsampling) and gpu (pretraining's images by nvJPEG).",
    )
    chunk: int = setting(
        64, at_least=1, unit="samples", doc="Samples read together; 1 is the perfect shuffle, for local NVMe."
    )
    window: int = setting(16, at_least=1, unit="chunks", doc="Window in which the samples of a lane are permuted.")
    lanes: int = setting(
        256,
        at_least=1,
        doc="Number of parallel sequences that the stream interleaves; a multiple of the number of processes has every "
        "image read by one node, and `plan` and `simulate` say which one suits.",
    )

    @property
    def exact_decoder(self) -> str:
        """The decoder for what is made once and for all, as tokens are: one that gives Pillow's pixels."""
        return "auto" if self.decoder in ("approximate", "gpu") else self.decoder

    @property
    def processor_decoder(self) -> str:
        """The decoder where no GPU takes part."""
        return "auto" if self.decoder == "gpu" else self.decoder


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When to save, and what to keep."""

    every: Duration = setting(Duration(1000, "steps"), more_than=0, doc="Interval between checkpoints.")
    keep: int = setting(3, at_least=1, doc="Number of newest checkpoints that are kept.")
    keep_every: Duration = setting(
        Duration(0, "steps"), at_least=0, doc="Interval between checkpoints that are kept for good; 0: none."
    )
    asynchronous: bool = setting(
        False, doc="Whether training continues while a checkpoint is written; copies optimizer state to host memory."
    )


@dataclass(frozen=True, kw_only=True)
class Faults:
    """When a run returns to a checkpoint or ends, and what it reports in the log. 0 switches a check off."""

    max_skipped: int = setting(
        5, at_least=1, doc="Consecutive non-finite updates that are skipped before returning to a checkpoint."
    )
    max_returns: int = setting(
        3, at_least=0, doc="Returns without a checkpoint's worth of progress between them that end the run."
    )
    hang_seconds: float = setting(
        600.0,
        at_least=0,
        unit="seconds",
        doc="Time without a step, save or evaluation after which a process ends; three times it for the first of each.",
    )
    spike: float = setting(
        10.0, at_least=0, unit="deviations", doc="Distance above the median of the last 50 losses that is reported."
    )
    straggler: float = setting(
        1.5, at_least=0, doc="Forward time of a rank that is reported, as a multiple of the median rank's."
    )
    starved: float = setting(0.2, at_least=0, doc="Share of a rank's time spent waiting for data that is reported.")


@dataclass(frozen=True, kw_only=True)
class Log:
    """What is measured, and how often."""

    every_steps: int = setting(20, at_least=1, unit="steps", doc="Interval between lines of metrics.")
    heldout_every: Duration = setting(
        Duration(1000, "steps"),
        more_than=0,
        hint="log.evaluation_share=0 leaves evaluations out",
        doc="Interval between evaluations.",
    )
    heldout_samples: int = setting(
        4096,
        at_least=1,
        unit="samples",
        doc="Held-out samples of an evaluation, and as many new views; k-NN chooses from ten times as many.",
    )
    evaluation_share: float = setting(
        0.05,
        at_least=0,
        at_most=1,
        doc="Share of the run's time that evaluations may take; others are left out (0: all).",
    )
    tensorboard: bool = setting(True, doc="Whether metrics are also written for TensorBoard.")
    wandb: str = setting("", doc="Project at Weights & Biases; empty: none.")
    positions: bool = setting(False, doc="Whether every sample that a rank takes is recorded in positions/.")
    peak_tflops: float = setting(
        0.0,
        at_least=0,
        unit="TFLOP/s",
        doc="Peak of one device at the precision used; 0: the built-in table, and no MFU for a device not in it.",
    )
