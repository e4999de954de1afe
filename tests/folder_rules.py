"""The table that tests/test_folder_rules.py holds: which folder may import what.

Module names are written without `beitforge.`. Each folder may import itself; everything in shards its root modules;
everything in pipeline its `errors`, `console`, `config`, `plain_text` and `reading`, and `shards.errors`.
"""

from dataclasses import dataclass

SHARDS_ROOT = (
    "shards.counter_rng shards.errors shards.lanes shards.options shards.progress shards.wording shards.workers"
)
PIPELINE_ROOT = "pipeline.config pipeline.console pipeline.errors pipeline.plain_text pipeline.reading shards.errors"
SHARDS = "shards.storage shards.format shards.decode shards.stream"
TORCHLESS = "torch kernels deepspeed"
NUMPY = "numpy xxhash"


@dataclass(frozen=True)
class Row:
    """One folder, or the modules of it that are an exception. The first row whose pattern fits a module is its row.

    may: folders, modules and libraries, by prefix. never: what it must not import, not even through others. alone: its
    modules must not import each other.
    """

    who: str
    may: str
    never: str = ""
    alone: bool = False


TABLE = (
    Row("kernels*", "torch triton", "shards pipeline deepspeed"),
    Row(
        "shards.stream.loader shards.stream.view_batches shards.stream.fixed_point shards.stream.on_device",
        f"{SHARDS} {NUMPY} torch",
        "kernels pipeline deepspeed",
    ),
    Row("shards.storage*", f"{NUMPY} fsspec aiohttp", f"pipeline {TORCHLESS}"),
    Row("shards.format*", f"shards.storage {NUMPY} safetensors", f"pipeline {TORCHLESS}"),
    Row(
        "shards.decode*", f"shards.format {NUMPY} PIL simplejpeg nvidia pillow_heif pillow_jxl", f"pipeline {TORCHLESS}"
    ),
    Row("shards.pack*", f"shards.decode shards.format shards.storage {NUMPY}", f"pipeline {TORCHLESS}"),
    Row("shards.stream*", f"{SHARDS} {NUMPY}", f"pipeline {TORCHLESS}"),
    Row("shards.inspect*", f"shards.pack {SHARDS} {NUMPY}", f"pipeline {TORCHLESS}"),
    Row("shards*", f"{NUMPY} tqdm", f"pipeline {TORCHLESS}"),
    Row("pipeline.config*", "yaml", "torch numpy shards kernels"),
    Row("pipeline.cluster*", "beitforge shards.storage", TORCHLESS),
    Row(
        "pipeline.runs*",
        "pipeline.cluster shards.format shards.storage shards.progress shards.wording numpy xxhash",
        TORCHLESS,
    ),
    Row("pipeline.model.masking", "numpy", "torch shards"),
    Row("pipeline.model*", "kernels torch torchao numpy scipy", "shards deepspeed"),
    Row("pipeline.tokenizers*", "pipeline.model torch safetensors", "pipeline.model.beit shards.stream deepspeed"),
    Row(
        "pipeline.data*",
        f"pipeline.tokenizers pipeline.model pipeline.cluster pipeline.torchvision_stub shards.counter_rng "
        f"shards.lanes {SHARDS} torch numpy scipy PIL timm",
        "pipeline.model.beit deepspeed",
    ),
    Row("pipeline.plan*", "pipeline.runs shards.counter_rng shards.lanes numpy", TORCHLESS),
    Row(
        "pipeline.distributed*", "pipeline.cluster pipeline.runs torch deepspeed xxhash", "pipeline.model shards.stream"
    ),
    Row("pipeline.checkpoints*", "pipeline.distributed pipeline.runs torch deepspeed", "pipeline.model shards.stream"),
    Row(
        "pipeline.training*",
        "pipeline.checkpoints pipeline.distributed pipeline.runs pipeline.cluster pipeline.data pipeline.model kernels "
        "shards.progress shards.decode shards.stream torch wandb",
        "pipeline.model.beit",
    ),
    Row(
        "pipeline.weights*",
        "pipeline.checkpoints pipeline.model pipeline.runs pipeline.tokenizers.safe_pickle pipeline.torchvision_stub "
        "torch safetensors transformers timm",
        "shards.stream",
    ),
    Row(
        "pipeline.evaluation*",
        "pipeline.training pipeline.distributed pipeline.data pipeline.tokenizers pipeline.model kernels shards.format "
        "shards.stream torch numpy",
        "pipeline.reports pipeline.stages",
    ),
    Row(
        "pipeline.doctor.findings pipeline.doctor.host pipeline.doctor.ssh",
        "pipeline.cluster beitforge",
        "torch numpy",
    ),
    Row(
        "pipeline.doctor*",
        f"pipeline.training pipeline.distributed pipeline.data pipeline.plan pipeline.cluster pipeline.model kernels "
        f"shards.lanes {SHARDS} torch numpy",
        "pipeline.reports pipeline.weights",
    ),
    Row(
        "pipeline.reports.gallery* pipeline.replay*",
        f"pipeline.evaluation pipeline.weights pipeline.training pipeline.data pipeline.tokenizers pipeline.model "
        f"pipeline.checkpoints pipeline.distributed pipeline.reports.components pipeline.runs pipeline.cluster "
        f"shards.progress beitforge {SHARDS} torch numpy",
        "pipeline.watch pipeline.stages",
    ),
    Row("pipeline.reports*", "pipeline.runs shards.format numpy", f"{TORCHLESS} pipeline.watch"),
    Row("pipeline.watch*", "pipeline.reports pipeline.runs pipeline.cluster", TORCHLESS),
    Row(
        "pipeline.stages*", "pipeline kernels shards torch numpy safetensors beitforge", "pipeline.commands", alone=True
    ),
    Row("pipeline.commands*", "pipeline shards", alone=True),
    Row("pipeline pipeline.*", "pipeline.cluster torchvision beitforge", "torch numpy"),
)
