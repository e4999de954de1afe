"""The table that test_layers holds: who may import what. A name stands for its first row that fits."""

from dataclasses import dataclass

CONFIG = "pipeline.config pipeline.settings pipeline.rules"
ENGINE = f"{CONFIG} pipeline.engine"
LEARN = f"{CONFIG} kernels torch numpy pipeline.pixels"
REPORT = f"{CONFIG} pipeline.chart pipeline.lines pipeline.look pipeline.page pipeline.record pipeline.saved"
REPORT += " pipeline.words"
# shards without its two modules that use torch, and what a stage may use
TORCHLESS = "shards.storage.cache shards.decode.codec shards.counter_rng shards.errors shards.storage.files shards.format.manifest shards.progress"
TORCHLESS += " shards.storage.remote shards.format.tokens"
BELOW = "torch numpy shards pipeline.checkpoint pipeline.metrics pipeline.model pipeline.objective pipeline.optim"
BELOW += " pipeline.page pipeline.photos pipeline.pictures pipeline.pixels pipeline.probe pipeline.provenance"
BELOW += " pipeline.record pipeline.sections pipeline.signals pipeline.streams pipeline.tokenizer pipeline.training"
BELOW += " pipeline.loop pipeline.run pipeline.weights pipeline.dvae pipeline.precision pipeline.peers pipeline.resize"
PLAN = f"{CONFIG} pipeline.assumptions pipeline.costs pipeline.failures pipeline.forecast pipeline.machines"
PLAN += " pipeline.sharding pipeline.timeline"
UNPLANNED = "torch deepspeed shards.stream.loader pipeline.stages"
BELOW += " pipeline.labelled pipeline.complaints pipeline.opening"
BELOW += " pipeline.comparison pipeline.document pipeline.encoders pipeline.gallery pipeline.words pipeline.evaluation"
BELOW += " pipeline.ending pipeline.rendezvous pipeline.formats pipeline.foreign safetensors kernels"


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
        f"pipeline.commandline {CONFIG} pipeline.complaints pipeline.rendezvous pipeline.signals pipeline.stages "
        "pipeline.findings pipeline.checks_host pipeline.checks_ssh",
    ),
    Row("pipeline.settings", "", "torch numpy shards kernels"),
    Row("pipeline.commandline", "", "torch numpy shards kernels"),
    Row("pipeline.rules", "pipeline.settings", "torch numpy shards kernels"),
    Row("pipeline.config", "yaml pipeline.settings pipeline.rules", "torch numpy shards kernels"),
    Row("pipeline.rendezvous", CONFIG, "torch numpy shards"),
    Row("pipeline.complaints", f"{CONFIG} pipeline.rendezvous shards.errors", "torch numpy"),
    Row("pipeline.signals", "pipeline.rendezvous", "torch numpy shards"),
    Row("pipeline.carried", f"{CONFIG} pipeline.signals", "torch numpy shards"),
    Row("pipeline.findings", "", "torch numpy shards pipeline.config"),
    Row("pipeline.checks_host", f"{CONFIG} pipeline.findings pipeline.rendezvous", "torch numpy shards"),
    Row("pipeline.checks_ssh", "pipeline.findings pipeline.checks_host", "torch numpy shards"),
    Row(
        "pipeline.checks_data",
        f"{CONFIG} pipeline.findings pipeline.labelled pipeline.rendezvous pipeline.streams shards",
        "pipeline.model pipeline.stages deepspeed",
    ),
    Row(
        "pipeline.checks_device",
        f"{ENGINE} pipeline.findings pipeline.forecast pipeline.sharding pipeline.checks_host pipeline.metrics "
        "pipeline.model pipeline.objective "
        "pipeline.optim pipeline.rendezvous pipeline.streams kernels shards.stream.loader torch numpy",
        "pipeline.stages",
    ),
    Row("pipeline.checks_network", f"{ENGINE} pipeline.findings torch", "pipeline.model shards pipeline.stages"),
    Row(
        "pipeline.gathering",
        "pipeline.findings pipeline.rendezvous torch",
        "pipeline.model shards pipeline.stages deepspeed",
    ),
    Row("pipeline.blocks", LEARN, "shards deepspeed pipeline.stages pipeline.model"),
    Row("pipeline.model", f"{LEARN} pipeline.blocks", "shards deepspeed pipeline.stages"),
    Row(
        "pipeline.augment",
        f"{CONFIG} numpy scipy torch PIL timm shards.counter_rng pipeline.masking pipeline.stand_in",
        "shards.stream.loader deepspeed pipeline.stages pipeline.model",
    ),
    Row("pipeline.masking", LEARN, "shards deepspeed pipeline.stages torch"),
    Row("pipeline.objective", LEARN, "shards deepspeed pipeline.stages pipeline.model"),
    Row("pipeline.optim", LEARN, "shards deepspeed pipeline.stages pipeline.model"),
    Row("pipeline.pixels", "torch kernels", "shards deepspeed pipeline.stages"),
    Row("pipeline.dvae", LEARN, "shards deepspeed pipeline.stages pipeline.model"),
    Row("pipeline.dalle", LEARN, "shards deepspeed pipeline.stages pipeline.model"),
    Row("pipeline.vqkd", f"{LEARN} pipeline.blocks", "shards deepspeed pipeline.stages pipeline.model"),
    Row(
        "pipeline.tokenizer",
        f"{LEARN} safetensors pipeline.dvae pipeline.dalle pipeline.vqkd",
        "shards deepspeed pipeline.stages pipeline.model",
    ),
    Row(
        "pipeline.foreign",
        f"{CONFIG} torch safetensors pipeline.dalle pipeline.vqkd",
        "shards deepspeed pipeline.stages pipeline.model",
    ),
    Row("pipeline.stand_in", "torchvision", "shards deepspeed pipeline.stages pipeline.model torch"),
    Row("pipeline.formats", f"{CONFIG} torch", "shards deepspeed pipeline.stages pipeline.model"),
    Row("pipeline.resize", f"{CONFIG} torch scipy", "shards deepspeed pipeline.stages pipeline.model"),
    Row(
        "pipeline.peers",
        f"{CONFIG} torch safetensors pipeline.formats pipeline.stand_in transformers timm",
        "shards deepspeed pipeline.stages pipeline.model",
    ),
    Row("pipeline.precision", "torch pipeline.tokenizer", "shards deepspeed pipeline.stages pipeline.model"),
    Row("pipeline.probe", "torch", "shards deepspeed pipeline"),
    Row(
        "pipeline.engine",
        f"{CONFIG} torch deepspeed pipeline.rendezvous pipeline.sharding pipeline.watchdog pipeline.writer",
        "pipeline.model shards pipeline.stages",
    ),
    Row("pipeline.lines", "", "torch numpy shards"),
    Row("pipeline.saved", "", "torch numpy shards"),
    Row(
        "pipeline.metrics",
        f"{CONFIG} torch wandb pipeline.lines pipeline.run",
        "pipeline.model shards pipeline.stages deepspeed",
    ),
    Row("pipeline.run", f"{CONFIG} yaml", "pipeline.model shards pipeline.stages torch deepspeed"),
    Row("pipeline.writer", "torch deepspeed", "pipeline shards"),
    Row("pipeline.zero", f"{ENGINE} torch deepspeed", "pipeline.model shards pipeline.stages"),
    Row(
        "pipeline.checkpoint",
        f"{ENGINE} torch pipeline.metrics pipeline.saved pipeline.zero",
        "pipeline.model shards pipeline.stages",
    ),
    Row("pipeline.guard", f"{CONFIG} pipeline.run", "torch pipeline.model shards pipeline.stages"),
    Row("pipeline.watchdog", "", "torch pipeline.model shards pipeline.stages"),
    Row("pipeline.positions", "pipeline.run", "torch pipeline.model shards pipeline.stages"),
    Row("pipeline.pace", f"{CONFIG} torch", "pipeline.model shards pipeline.stages deepspeed"),
    Row(
        "pipeline.loop",
        f"{ENGINE} torch pipeline.feed pipeline.guard pipeline.metrics pipeline.pace pipeline.positions pipeline.run",
        "pipeline.model shards pipeline.stages",
    ),
    Row(
        "pipeline.opening",
        f"{ENGINE} pipeline.complaints pipeline.rendezvous pipeline.run",
        "pipeline.model pipeline.stages",
    ),
    Row("pipeline.ending", f"{ENGINE} pipeline.checkpoint pipeline.signals", "pipeline.model shards pipeline.stages"),
    Row("pipeline.feed", f"{CONFIG} torch pipeline.pace", "pipeline.model shards pipeline.stages"),
    Row(
        "pipeline.streams",
        f"{CONFIG} pipeline.masking pipeline.rendezvous pipeline.tokenizer shards numpy torch",
        "pipeline.model deepspeed pipeline.stages",
    ),
    Row(
        "pipeline.labelled",
        f"{CONFIG} pipeline.augment pipeline.streams shards numpy",
        "pipeline.model deepspeed pipeline.stages",
    ),
    Row(
        "pipeline.training",
        f"{ENGINE} pipeline.checkpoint pipeline.guard pipeline.loop pipeline.metrics pipeline.opening pipeline.optim "
        "pipeline.pace pipeline.positions pipeline.run pipeline.streams pipeline.watchdog shards torch",
        "pipeline.model pipeline.stages",
    ),
    Row(
        "pipeline.weights",
        f"{ENGINE} pipeline.checkpoint pipeline.metrics pipeline.model pipeline.resize pipeline.zero torch safetensors",
        "shards pipeline.stages",
    ),
    Row(
        "pipeline.survey",
        f"{ENGINE} torch pipeline.blocks pipeline.model pipeline.objective pipeline.probe pipeline.streams "
        "pipeline.tokenizer shards.stream.loader",
        "pipeline.stages",
    ),
    Row(
        "pipeline.evaluation",
        f"{ENGINE} torch pipeline.objective pipeline.labelled pipeline.precision pipeline.streams pipeline.survey "
        "pipeline.tokenizer shards",
        "pipeline.stages",
    ),
    Row("pipeline.photos", f"{CONFIG} numpy {TORCHLESS}", "torch deepspeed pipeline.stages"),
    Row("pipeline.words", "", "torch numpy shards pipeline.stages"),
    Row("pipeline.chart", "pipeline.words numpy", "torch deepspeed shards pipeline.stages"),
    Row("pipeline.look", "", "torch deepspeed shards pipeline.stages"),
    Row("pipeline.script", "", "torch numpy shards pipeline.stages"),
    Row("pipeline.page", f"{REPORT} pipeline.script", "torch deepspeed shards pipeline.stages"),
    Row("pipeline.record", f"{REPORT} numpy {TORCHLESS}", "torch pipeline.model pipeline.stages deepspeed"),
    Row("pipeline.sections", f"{REPORT} numpy {TORCHLESS}", "torch pipeline.model pipeline.stages deepspeed"),
    Row("pipeline.provenance", f"{REPORT} numpy {TORCHLESS}", "torch pipeline.model pipeline.stages"),
    Row(
        "pipeline.pictures",
        f"{LEARN} pipeline.model pipeline.objective pipeline.streams pipeline.tokenizer shards",
        "deepspeed pipeline.stages",
    ),
    Row("pipeline.curves", REPORT, "pipeline.model pipeline.stages deepspeed"),
    Row("pipeline.comparison", f"{REPORT} pipeline.sections", "pipeline.model pipeline.stages deepspeed"),
    Row("pipeline.document", f"{REPORT} pipeline.curves pipeline.sections", "pipeline.model pipeline.stages"),
    Row(
        "pipeline.attention_maps",
        f"{LEARN} pipeline.blocks pipeline.model pipeline.pictures",
        "deepspeed pipeline.stages",
    ),
    Row(
        "pipeline.neighbours",
        f"{LEARN} pipeline.attention_maps pipeline.model pipeline.pictures pipeline.probe shards.stream.loader",
        "deepspeed pipeline.stages",
    ),
    Row("pipeline.encoders", f"{CONFIG} torch pipeline.model pipeline.weights", "shards pipeline.stages"),
    Row(
        "pipeline.gallery",
        f"{REPORT} numpy torch pipeline.attention_maps pipeline.encoders pipeline.model pipeline.neighbours "
        "pipeline.objective pipeline.pictures pipeline.precision pipeline.streams pipeline.tokenizer "
        "pipeline.checkpoint shards",
        "pipeline.stages",
    ),
    Row(
        "pipeline.following",
        f"{CONFIG} pipeline.lines pipeline.saved pipeline.signals pipeline.words",
        "torch numpy shards",
    ),
    Row("pipeline.live", "", "torch numpy shards"),
    Row("pipeline.live_look", "", "torch numpy shards"),
    Row("pipeline.serving", CONFIG, "torch numpy shards"),
    Row("pipeline.beside", "", "torch numpy shards"),
    Row(
        "pipeline.terminal",
        f"{CONFIG} pipeline.following pipeline.lines pipeline.record pipeline.words",
        "torch deepspeed pipeline.model pipeline.stages",
    ),
    Row(
        "pipeline.picturing",
        f"{REPORT} pipeline.beside pipeline.gallery pipeline.signals torch",
        "pipeline.stages",
    ),
    Row("pipeline.machines", "", UNPLANNED),
    Row("pipeline.costs", CONFIG, UNPLANNED),
    Row("pipeline.assumptions", CONFIG, UNPLANNED),
    Row("pipeline.sharding", PLAN, UNPLANNED),
    Row("pipeline.failures", "numpy shards.counter_rng", UNPLANNED),
    Row("pipeline.timeline", "numpy pipeline.failures shards.counter_rng", UNPLANNED),
    Row("pipeline.forecast", PLAN, UNPLANNED),
    Row("pipeline.planned", PLAN, UNPLANNED),
    Row("pipeline.stages", ""),
    Row("pipeline.stages.launch", f"{CONFIG} pipeline.carried pipeline.signals", "torch numpy shards"),
    Row("pipeline.stages.slurm", f"{CONFIG} pipeline.signals shards.__main__ shards.storage.files"),
    Row(
        "pipeline.stages.plan",
        f"{PLAN} pipeline.planned shards.errors shards.format.manifest",
        "torch deepspeed shards.stream.loader",
    ),
    Row(
        "pipeline.stages.watch",
        f"{REPORT} pipeline.beside pipeline.document pipeline.following pipeline.live pipeline.live_look "
        "pipeline.provenance pipeline.script pipeline.serving pipeline.terminal pipeline.words",
        "torch deepspeed pipeline.model",
    ),
    Row("pipeline.stages.stop", f"{CONFIG} pipeline.signals", "torch numpy shards"),
    Row(
        "pipeline.stages.doctor",
        f"{ENGINE} {BELOW} pipeline.findings pipeline.gathering pipeline.forecast pipeline.sharding "
        "pipeline.checks_data pipeline.checks_device pipeline.checks_host pipeline.checks_network",
    ),
    Row("pipeline.stages.*", f"{ENGINE} {BELOW}"),
)
