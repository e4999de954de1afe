"""The table that test_layers holds: who may import what. A name stands for its first row that fits."""

from dataclasses import dataclass

CONFIG = "pipeline.config.loading pipeline.config.settings pipeline.config.validation"
ENGINE = f"{CONFIG} pipeline.distributed.engine"
LEARN = f"{CONFIG} kernels torch numpy pipeline.model.pixels"
REPORT = f"{CONFIG} pipeline.reports.charts pipeline.runs.jsonl pipeline.reports.css pipeline.reports.components pipeline.runs.record pipeline.runs.checkpoints"
REPORT += " pipeline.runs.formatting"
# shards without its two modules that use torch, and what a stage may use
TORCHLESS = "shards.storage.cache shards.decode.codec shards.counter_rng shards.errors shards.storage.files shards.format.manifest shards.progress"
TORCHLESS += " shards.storage.remote shards.format.tokens"
BELOW = "torch numpy shards pipeline.checkpoints.saver pipeline.training.metrics pipeline.model.beit pipeline.training.objectives pipeline.training.optim"
BELOW += " pipeline.reports.components pipeline.data.demo_images pipeline.evaluation.reconstructions pipeline.model.pixels pipeline.evaluation.probe pipeline.reports.provenance"
BELOW += " pipeline.runs.record pipeline.reports.summary pipeline.cluster.signals pipeline.data.pretraining pipeline.tokenizers.storage pipeline.training.trainer"
BELOW += " pipeline.training.loop pipeline.runs.folder pipeline.weights.encoder pipeline.tokenizers.dvae pipeline.tokenizers.precision pipeline.weights.export_formats pipeline.model.resize"
PLAN = f"{CONFIG} pipeline.plan.assumptions pipeline.plan.costs pipeline.plan.failures pipeline.plan.estimate pipeline.plan.hardware"
PLAN += " pipeline.plan.zero_model pipeline.plan.simulation"
UNPLANNED = "torch deepspeed shards.stream.loader pipeline.stages"
BELOW += " pipeline.data.labelled pipeline.cluster.error_reporting pipeline.distributed.startup"
BELOW += " pipeline.reports.comparison pipeline.reports.report pipeline.weights.from_run pipeline.reports.gallery pipeline.runs.formatting pipeline.evaluation.evaluations"
BELOW += " pipeline.training.shutdown pipeline.cluster.environment pipeline.weights.conversion pipeline.tokenizers.published safetensors kernels"


@dataclass(frozen=True)
class Row:
    """The first row whose pattern fits a module is its row."""

    who: str
    may: str
    never: str = ""


TABLE = (
    Row("kernels*", "kernels torch triton", "shards pipeline deepspeed"),
    Row("shards.decode.codec", "shards numpy PIL", "kernels pipeline deepspeed torch"),
    Row("shards.decode.jpeg", "shards.errors numpy PIL nvidia simplejpeg", "kernels pipeline deepspeed torch"),
    Row("shards.storage.remote", "shards xxhash fsspec aiohttp", "kernels pipeline deepspeed torch"),
    Row("shards.stream.loader", "shards numpy torch", "kernels pipeline deepspeed"),
    Row("shards.stream.view_batches", "shards numpy torch", "kernels pipeline deepspeed"),
    Row("shards*", "shards numpy webdataset yaml safetensors xxhash tqdm", "kernels pipeline deepspeed torch"),
    Row("pipeline", ""),
    Row(
        "pipeline.__main__",
        f"pipeline.cli {CONFIG} pipeline.cluster.error_reporting pipeline.cluster.environment pipeline.cluster.signals pipeline.stages "
        "pipeline.doctor.findings pipeline.doctor.host pipeline.doctor.ssh",
    ),
    Row("pipeline.config.settings", "", "torch numpy shards kernels"),
    Row("pipeline.cli", "", "torch numpy shards kernels"),
    Row("pipeline.config.validation", "pipeline.config.settings", "torch numpy shards kernels"),
    Row(
        "pipeline.config.loading",
        "yaml pipeline.config.settings pipeline.config.validation",
        "torch numpy shards kernels",
    ),
    Row("pipeline.cluster.environment", CONFIG, "torch numpy shards"),
    Row("pipeline.cluster.error_reporting", f"{CONFIG} pipeline.cluster.environment shards.errors", "torch numpy"),
    Row("pipeline.cluster.signals", "pipeline.cluster.environment", "torch numpy shards"),
    Row("pipeline.cluster.ssh_environment", f"{CONFIG} pipeline.cluster.signals", "torch numpy shards"),
    Row("pipeline.doctor.findings", "", "torch numpy shards pipeline.config.loading"),
    Row(
        "pipeline.doctor.host", f"{CONFIG} pipeline.doctor.findings pipeline.cluster.environment", "torch numpy shards"
    ),
    Row("pipeline.doctor.ssh", "pipeline.doctor.findings pipeline.doctor.host", "torch numpy shards"),
    Row(
        "pipeline.doctor.data",
        f"{CONFIG} pipeline.doctor.findings pipeline.data.labelled pipeline.cluster.environment pipeline.data.pretraining shards",
        "pipeline.model.beit pipeline.stages deepspeed",
    ),
    Row(
        "pipeline.doctor.device",
        f"{ENGINE} pipeline.doctor.findings pipeline.plan.estimate pipeline.plan.zero_model pipeline.doctor.host pipeline.training.metrics "
        "pipeline.model.beit pipeline.training.objectives "
        "pipeline.training.optim pipeline.cluster.environment pipeline.data.pretraining kernels shards.stream.loader torch numpy",
        "pipeline.stages",
    ),
    Row(
        "pipeline.doctor.network",
        f"{ENGINE} pipeline.doctor.findings torch",
        "pipeline.model.beit shards pipeline.stages",
    ),
    Row(
        "pipeline.doctor.collect",
        "pipeline.doctor.findings pipeline.cluster.environment torch",
        "pipeline.model.beit shards pipeline.stages deepspeed",
    ),
    Row("pipeline.model.blocks", LEARN, "shards deepspeed pipeline.stages pipeline.model.beit"),
    Row("pipeline.model.beit", f"{LEARN} pipeline.model.blocks", "shards deepspeed pipeline.stages"),
    Row(
        "pipeline.data.augment",
        f"{CONFIG} numpy scipy torch PIL timm shards.counter_rng pipeline.model.masking pipeline.torchvision_stub",
        "shards.stream.loader deepspeed pipeline.stages pipeline.model.beit",
    ),
    Row("pipeline.model.masking", LEARN, "shards deepspeed pipeline.stages torch"),
    Row("pipeline.training.objectives", LEARN, "shards deepspeed pipeline.stages pipeline.model.beit"),
    Row("pipeline.training.optim", LEARN, "shards deepspeed pipeline.stages pipeline.model.beit"),
    Row("pipeline.model.pixels", "torch kernels", "shards deepspeed pipeline.stages"),
    Row("pipeline.tokenizers.dvae", LEARN, "shards deepspeed pipeline.stages pipeline.model.beit"),
    Row("pipeline.tokenizers.dalle", LEARN, "shards deepspeed pipeline.stages pipeline.model.beit"),
    Row(
        "pipeline.tokenizers.vqkd",
        f"{LEARN} pipeline.model.blocks",
        "shards deepspeed pipeline.stages pipeline.model.beit",
    ),
    Row(
        "pipeline.tokenizers.storage",
        f"{LEARN} safetensors pipeline.tokenizers.dvae pipeline.tokenizers.dalle pipeline.tokenizers.vqkd",
        "shards deepspeed pipeline.stages pipeline.model.beit",
    ),
    Row(
        "pipeline.tokenizers.published",
        f"{CONFIG} torch safetensors pipeline.tokenizers.dalle pipeline.tokenizers.vqkd",
        "shards deepspeed pipeline.stages pipeline.model.beit",
    ),
    Row("pipeline.torchvision_stub", "torchvision", "shards deepspeed pipeline.stages pipeline.model.beit torch"),
    Row("pipeline.weights.conversion", f"{CONFIG} torch", "shards deepspeed pipeline.stages pipeline.model.beit"),
    Row("pipeline.model.resize", f"{CONFIG} torch scipy", "shards deepspeed pipeline.stages pipeline.model.beit"),
    Row(
        "pipeline.weights.export_formats",
        f"{CONFIG} torch safetensors pipeline.weights.conversion pipeline.torchvision_stub transformers timm",
        "shards deepspeed pipeline.stages pipeline.model.beit",
    ),
    Row(
        "pipeline.tokenizers.precision",
        "torch pipeline.tokenizers.storage",
        "shards deepspeed pipeline.stages pipeline.model.beit",
    ),
    Row("pipeline.evaluation.probe", "torch", "shards deepspeed pipeline"),
    Row(
        "pipeline.distributed.engine",
        f"{CONFIG} torch deepspeed pipeline.cluster.environment pipeline.plan.zero_model pipeline.cluster.watchdog pipeline.distributed.file_writer",
        "pipeline.model.beit shards pipeline.stages",
    ),
    Row("pipeline.runs.jsonl", "", "torch numpy shards"),
    Row("pipeline.runs.checkpoints", "", "torch numpy shards"),
    Row(
        "pipeline.training.metrics",
        f"{CONFIG} torch wandb pipeline.runs.jsonl pipeline.runs.folder",
        "pipeline.model.beit shards pipeline.stages deepspeed",
    ),
    Row("pipeline.runs.folder", f"{CONFIG} yaml", "pipeline.model.beit shards pipeline.stages torch deepspeed"),
    Row("pipeline.distributed.file_writer", "torch deepspeed", "pipeline shards"),
    Row("pipeline.checkpoints.zero_layout", f"{ENGINE} torch deepspeed", "pipeline.model.beit shards pipeline.stages"),
    Row(
        "pipeline.checkpoints.saver",
        f"{ENGINE} torch pipeline.training.metrics pipeline.runs.checkpoints pipeline.checkpoints.zero_layout",
        "pipeline.model.beit shards pipeline.stages",
    ),
    Row(
        "pipeline.training.recovery",
        f"{CONFIG} pipeline.runs.folder",
        "torch pipeline.model.beit shards pipeline.stages",
    ),
    Row("pipeline.cluster.watchdog", "", "torch pipeline.model.beit shards pipeline.stages"),
    Row("pipeline.training.sample_log", "pipeline.runs.folder", "torch pipeline.model.beit shards pipeline.stages"),
    Row("pipeline.training.monitor", f"{CONFIG} torch", "pipeline.model.beit shards pipeline.stages deepspeed"),
    Row(
        "pipeline.training.loop",
        f"{ENGINE} torch pipeline.training.prefetch pipeline.training.recovery pipeline.training.metrics pipeline.training.monitor pipeline.training.sample_log pipeline.runs.folder",
        "pipeline.model.beit shards pipeline.stages",
    ),
    Row(
        "pipeline.distributed.startup",
        f"{ENGINE} pipeline.cluster.error_reporting pipeline.cluster.environment pipeline.runs.folder",
        "pipeline.model.beit pipeline.stages",
    ),
    Row(
        "pipeline.training.shutdown",
        f"{ENGINE} pipeline.checkpoints.saver pipeline.cluster.signals",
        "pipeline.model.beit shards pipeline.stages",
    ),
    Row(
        "pipeline.training.prefetch",
        f"{CONFIG} torch pipeline.training.monitor",
        "pipeline.model.beit shards pipeline.stages",
    ),
    Row(
        "pipeline.data.pretraining",
        f"{CONFIG} pipeline.model.masking pipeline.cluster.environment pipeline.tokenizers.storage shards numpy torch",
        "pipeline.model.beit deepspeed pipeline.stages",
    ),
    Row(
        "pipeline.data.labelled",
        f"{CONFIG} pipeline.data.augment pipeline.data.pretraining shards numpy",
        "pipeline.model.beit deepspeed pipeline.stages",
    ),
    Row(
        "pipeline.training.trainer",
        f"{ENGINE} pipeline.checkpoints.saver pipeline.training.recovery pipeline.training.loop pipeline.training.metrics pipeline.distributed.startup pipeline.training.optim "
        "pipeline.training.monitor pipeline.training.sample_log pipeline.runs.folder pipeline.data.pretraining pipeline.cluster.watchdog shards torch",
        "pipeline.model.beit pipeline.stages",
    ),
    Row(
        "pipeline.weights.encoder",
        f"{ENGINE} pipeline.checkpoints.saver pipeline.training.metrics pipeline.model.beit pipeline.model.resize pipeline.checkpoints.zero_layout torch safetensors",
        "shards pipeline.stages",
    ),
    Row(
        "pipeline.evaluation.diagnostics",
        f"{ENGINE} torch pipeline.model.blocks pipeline.model.beit pipeline.training.objectives pipeline.evaluation.probe pipeline.data.pretraining "
        "pipeline.tokenizers.storage shards.stream.loader",
        "pipeline.stages",
    ),
    Row(
        "pipeline.evaluation.evaluations",
        f"{ENGINE} torch pipeline.training.objectives pipeline.data.labelled pipeline.tokenizers.precision pipeline.data.pretraining pipeline.evaluation.diagnostics "
        "pipeline.tokenizers.storage shards",
        "pipeline.stages",
    ),
    Row("pipeline.data.demo_images", f"{CONFIG} numpy {TORCHLESS}", "torch deepspeed pipeline.stages"),
    Row("pipeline.runs.formatting", "", "torch numpy shards pipeline.stages"),
    Row("pipeline.reports.charts", "pipeline.runs.formatting numpy", "torch deepspeed shards pipeline.stages"),
    Row("pipeline.reports.css", "", "torch deepspeed shards pipeline.stages"),
    Row("pipeline.reports.js", "", "torch numpy shards pipeline.stages"),
    Row("pipeline.reports.components", f"{REPORT} pipeline.reports.js", "torch deepspeed shards pipeline.stages"),
    Row("pipeline.runs.record", f"{REPORT} numpy {TORCHLESS}", "torch pipeline.model.beit pipeline.stages deepspeed"),
    Row(
        "pipeline.reports.summary", f"{REPORT} numpy {TORCHLESS}", "torch pipeline.model.beit pipeline.stages deepspeed"
    ),
    Row("pipeline.reports.provenance", f"{REPORT} numpy {TORCHLESS}", "torch pipeline.model.beit pipeline.stages"),
    Row(
        "pipeline.evaluation.reconstructions",
        f"{LEARN} pipeline.model.beit pipeline.training.objectives pipeline.data.pretraining pipeline.tokenizers.storage shards",
        "deepspeed pipeline.stages",
    ),
    Row("pipeline.reports.curves", REPORT, "pipeline.model.beit pipeline.stages deepspeed"),
    Row(
        "pipeline.reports.comparison",
        f"{REPORT} pipeline.reports.summary",
        "pipeline.model.beit pipeline.stages deepspeed",
    ),
    Row(
        "pipeline.reports.report",
        f"{REPORT} pipeline.reports.curves pipeline.reports.summary",
        "pipeline.model.beit pipeline.stages",
    ),
    Row(
        "pipeline.evaluation.attention_maps",
        f"{LEARN} pipeline.model.blocks pipeline.model.beit pipeline.evaluation.reconstructions",
        "deepspeed pipeline.stages",
    ),
    Row(
        "pipeline.evaluation.neighbours",
        f"{LEARN} pipeline.evaluation.attention_maps pipeline.model.beit pipeline.evaluation.reconstructions pipeline.evaluation.probe shards.stream.loader",
        "deepspeed pipeline.stages",
    ),
    Row(
        "pipeline.weights.from_run",
        f"{CONFIG} torch pipeline.model.beit pipeline.weights.encoder",
        "shards pipeline.stages",
    ),
    Row(
        "pipeline.reports.gallery",
        f"{REPORT} numpy torch pipeline.evaluation.attention_maps pipeline.weights.from_run pipeline.model.beit pipeline.evaluation.neighbours "
        "pipeline.training.objectives pipeline.evaluation.reconstructions pipeline.tokenizers.precision pipeline.data.pretraining pipeline.tokenizers.storage "
        "pipeline.checkpoints.saver shards",
        "pipeline.stages",
    ),
    Row(
        "pipeline.runs.status",
        f"{CONFIG} pipeline.runs.jsonl pipeline.runs.checkpoints pipeline.cluster.signals pipeline.runs.formatting",
        "torch numpy shards",
    ),
    Row("pipeline.watch.fragments", "", "torch numpy shards"),
    Row("pipeline.watch.live_js", "", "torch numpy shards"),
    Row("pipeline.watch.server", CONFIG, "torch numpy shards"),
    Row("pipeline.watch.background", "", "torch numpy shards"),
    Row(
        "pipeline.watch.terminal",
        f"{CONFIG} pipeline.runs.status pipeline.runs.jsonl pipeline.runs.record pipeline.runs.formatting",
        "torch deepspeed pipeline.model.beit pipeline.stages",
    ),
    Row(
        "pipeline.reports.gallery_worker",
        f"{REPORT} pipeline.watch.background pipeline.reports.gallery pipeline.cluster.signals torch",
        "pipeline.stages",
    ),
    Row("pipeline.plan.hardware", "", UNPLANNED),
    Row("pipeline.plan.costs", CONFIG, UNPLANNED),
    Row("pipeline.plan.assumptions", CONFIG, UNPLANNED),
    Row("pipeline.plan.zero_model", PLAN, UNPLANNED),
    Row("pipeline.plan.failures", "numpy shards.counter_rng", UNPLANNED),
    Row("pipeline.plan.simulation", "numpy pipeline.plan.failures shards.counter_rng", UNPLANNED),
    Row("pipeline.plan.estimate", PLAN, UNPLANNED),
    Row("pipeline.plan.tables", PLAN, UNPLANNED),
    Row("pipeline.stages", ""),
    Row(
        "pipeline.commands.launch",
        f"{CONFIG} pipeline.cluster.ssh_environment pipeline.cluster.signals",
        "torch numpy shards",
    ),
    Row("pipeline.commands.slurm", f"{CONFIG} pipeline.cluster.signals shards.__main__ shards.storage.files"),
    Row(
        "pipeline.commands.plan",
        f"{PLAN} pipeline.plan.tables shards.errors shards.format.manifest",
        "torch deepspeed shards.stream.loader",
    ),
    Row(
        "pipeline.commands.watch",
        f"{REPORT} pipeline.watch.background pipeline.reports.report pipeline.runs.status pipeline.watch.fragments pipeline.watch.live_js "
        "pipeline.reports.provenance pipeline.reports.js pipeline.watch.server pipeline.watch.terminal pipeline.runs.formatting",
        "torch deepspeed pipeline.model.beit",
    ),
    Row("pipeline.commands.stop", f"{CONFIG} pipeline.cluster.signals", "torch numpy shards"),
    Row(
        "pipeline.stages.doctor",
        f"{ENGINE} {BELOW} pipeline.doctor.findings pipeline.doctor.collect pipeline.plan.estimate pipeline.plan.zero_model "
        "pipeline.doctor.data pipeline.doctor.device pipeline.doctor.host pipeline.doctor.network",
    ),
    Row("pipeline.stages.*", f"{ENGINE} {BELOW}"),
)
