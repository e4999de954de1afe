"""The pages of `plan` for people: tables of forecasts, and what they rest on. Must not know torch or any stage."""

import math

from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.console import align_columns
from beitforge.pipeline.plan.costs import launches, training_flops
from beitforge.pipeline.plan.estimate import (
    CHECKPOINTING,
    Estimate,
    Machine,
    activations_of,
    kernels_of,
    seconds_per_image,
    size_of,
)
from beitforge.pipeline.plan.tokenization import tokenizations
from beitforge.pipeline.plan.zero_model import zero_settings
from beitforge.shards.lanes import MUCH, advice

_SOURCES = """Formulas
  parameters, operations   those of pipeline.model.beit; MFU with the last block whole (docs/recipe.md, "Cost")
  model states             ZeRO, arXiv 1910.02054, section 5, with DeepSpeed 0.19's buckets and padding
  bytes sent               ring collectives (Patarasuk and Yuan 2009); ZeRO section 7, but DeepSpeed's ZeRO-1 and 2 send
                           3 Ψ, not 2 Ψ; each counted at the collectives (tests/pipeline/plan/test_plan_ranks.py)
  activations              what autograd keeps, counted (tests/pipeline/plan/test_costs.py);
                           checkpointing arXiv 1604.06174, selective arXiv 2205.05198
  time of a step           products, then everything else's bytes (Williams et al. 2009); α-β model of collectives
                           (Thakur et al. 2005); blocks and buckets walked one by one (pipeline/plan/simulation.py)
  goodput                  slowest rank, loader, checkpoints, failures: simulated; Young 1974, Daly 2006 (eq. 20)"""


def render(
    config: Config,
    machine: Machine,
    images: int,
    origin: str,
    rows: list[Estimate],
    refused: list[str],
    best: tuple[Estimate | None, Estimate | None] | None,
    days: float,
) -> str:
    """The whole page."""
    parts = [_head(config, machine, images, origin), _memory(rows, machine), _checkpointing(config, machine, rows[0])]
    parts += [_time(rows), _needs(config, machine, rows), _failures(config, rows)]
    if refused:
        parts.append("\n".join(f"left out: {line}" for line in refused))
    parts.append(_tokens(config, machine, images))
    if best is not None:
        parts.append(_deadline(best, days))
    parts += [_advice(config, machine, rows), _SOURCES, _assumptions(machine)]
    return "\n\n".join(part for part in parts if part)


def _table(title: str, columns: list[str], lines: list[list[str]]) -> str:
    return "\n".join([title, *(f"  {row}" for row in align_columns([columns, *lines], right=True))])


def _head(config: Config, machine: Machine, images: int, origin: str) -> str:
    model, train = config.model, config.train
    flops = training_flops(model, config.tokenizer.vocabulary, config.mask.num_patches)
    steps = train.duration.steps(train.epoch_samples(images), train.global_batch)
    chip, network, storage = machine.chip, machine.network, machine.storage
    return "\n".join(
        [
            f"{model.layers} layers × {model.width}, {size_of(config):,} parameters, {flops / 1e9:.1f} GFLOP an image, "
            f"{train.precision}{', compiled' if train.compile else ''}, attention {kernels_of(config)}, "
            f"{ {'adamw': 'AdamW', 'muon': 'Muon'}[config.optimizer.kind] }",
            f"{train.duration}: {steps:,} steps of {train.global_batch} of {images:,} images ({origin})",
            f"not in the times below: evaluations, at most {config.log.evaluation_share:.0%} of the run's "
            "(log.evaluation_share)",
            f"{chip.name}: {chip.flops16 / 1e12:.0f} TFLOP/s, {chip.memory / 1e9:.0f} GB at "
            f"{chip.memory_bandwidth / 1e12:.2f} TB/s, {chip.per_node} a node ({chip.source})",
            f"{network.name}: {network.node_bandwidth / 1e9:.1f} GB/s a node ({network.source}); "
            f"{storage.name}: {storage.node_read / 1e9:.1f} GB/s a node ({storage.source})",
        ]
    )


def _memory(rows: list[Estimate], machine: Machine) -> str:
    """Parts in GB, then the largest micro batches."""
    columns = ["GPUs", "ZeRO", "weights", "gradients", "optimizer", "buffers", "micro"]
    columns += ["activations", "selective", "full", "total", "", "largest micro", "selective", "full"]
    lines = []
    for row in rows:
        memory = row.memory
        parts = [memory.states.parameters, memory.states.gradients, memory.states.optimizer, memory.states.buffers]
        kept = memory.activations.values()
        total = memory.total(row.checkpointing)
        numbers = [*(f"{part / 1e9:.2f}" for part in parts), str(row.micro), *(f"{part / 1e9:.2f}" for part in kept)]
        fits = "fits" if memory.fits(row.checkpointing) else "TOO MUCH"
        largest = [str(number) for number in memory.largest.values()]
        lines.append([str(row.gpus), str(row.stage), *numbers, f"{total / 1e9:.2f}", fits, *largest])
    run = machine.assumed.memory_bytes
    title = f"Memory of the fullest GPU, GB of {machine.usable / 1e9:.1f} usable"
    return _table(title + (f"; a run took {run / 1e9:.2f}" if run else ""), columns, lines)


def _checkpointing(config: Config, machine: Machine, row: Estimate) -> str:
    """What each kind of train.activation_checkpointing keeps and takes."""
    columns, lines = ["recomputed", "kept MB", "forward ms", "backward ms", "to none", "host ms a micro batch"], []
    least = sum(seconds_per_image(config, machine, "none"))
    for kind in CHECKPOINTING:
        forward, backward = seconds_per_image(config, machine, kind)
        kept = activations_of(config, kind).per_image
        taken = f"{(forward + backward) / least - 1:+.1%}"
        host = launches(config.model, config.train.compile, kind) * machine.assumed.launch_seconds
        times = [f"{1e3 * forward:.3f}", f"{1e3 * backward:.3f}", taken, f"{1e3 * host:.1f}"]
        lines.append([kind, f"{kept / 1e6:.1f}", *times])
    chosen = f"train.activation_checkpointing is {row.checkpointing}"
    return _table(f"An image by what backward recomputes ({chosen})", columns, lines)


def _time(rows: list[Estimate]) -> str:
    columns = ["GPUs", "ZeRO", "micro", "sent GB", "hidden", "compute ms", "network", "late", "starved", "step ms"]
    columns += ["images/s", "MFU", "goodput", "days", "GPU-hours", "kWh"]
    lines = []
    for row in rows:
        life = row.life
        times = [life.compute, life.exposed, life.late, life.starved, life.step]
        lines.append(
            [
                str(row.gpus),
                str(row.stage),
                f"{row.micro}×{row.accumulation}",
                f"{row.sent / 1e9:.3f}",
                f"{row.step.hidden:.0%}" if row.step.busy else "-",
                *(f"{1e3 * max(0.0, seconds):.1f}" for seconds in times),
                f"{row.images_per_second:,.0f}",
                f"{row.mfu:.1%}",
                f"{life.goodput:.1%}",
                _short(row.days),
                f"{row.gpu_hours:,.0f}",
                f"{row.kwh:,.0f}",
            ]
        )
    return _table("A step (bytes sent by one GPU), and the whole recipe", columns, lines)


def _short(days: float) -> str:
    return f"{days:.2f}" if days < 100 else f"{days:,.0f}"


def _one_each(rows: list[Estimate]) -> list[Estimate]:
    """Of each number of GPUs the fastest stage that fits, else the fastest."""
    found: dict[int, Estimate] = {}
    for row in sorted(rows, key=lambda row: (not row.memory.fits(row.checkpointing), row.days)):
        found.setdefault(row.gpus, row)
    return [found[gpus] for gpus in sorted(found)]


def _needs(config: Config, machine: Machine, rows: list[Estimate]) -> str:
    columns = [
        "GPUs",
        "ZeRO",
        "images/s",
        "times the set",
        "read GB/s",
        "a node GB/s",
        "it has",
        "to the GPUs GB/s",
        "cores a node",
        "it has",
    ]
    lines = []
    for row in _one_each(rows):
        load = row.loading
        lines.append(
            [
                str(row.gpus),
                str(row.stage),
                f"{load.images:,.0f}",
                f"{load.times_read:.1f}",
                f"{load.bytes_read / 1e9:.2f}",
                f"{load.node_read / 1e9:.2f}",
                f"{machine.read(row.gpus) / 1e9:.2f}",
                f"{load.bytes_to_gpus / 1e9:.2f}",
                f"{load.cores_per_node:.1f}",
                str(machine.chip.cores_per_node),
            ]
        )
    title = f"What the loader must deliver ({config.loader.workers} workers a process)"
    return _table(title, columns, lines)


def _failures(config: Config, rows: list[Estimate]) -> str:
    """Checkpoints as configured and at best."""
    columns = ["GPUs", "checkpoint GB", "stall s", "fails every", "every (config)", "goodput", "best every", "Young"]
    columns += ["Daly", "goodput at best"]
    lines = []
    for row in _one_each(rows):
        life, every = row.life, config.checkpoint.every
        lines.append(
            [
                str(row.gpus),
                f"{row.checkpoint_bytes / 1e9:.2f}",
                f"{row.stall:.1f}",
                _clock(row.mtbf),
                str(every),
                f"{life.survived:.2%}",
                *(_clock(seconds) for seconds in (life.best_every, life.young, life.daly)),
                f"{life.best_survived:.2%}",
            ]
        )
    kind = "asynchronous" if config.checkpoint.asynchronous else "synchronous"
    return _table(f"Failures and {kind} checkpoints", columns, lines)


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "never"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _tokens(config: Config, machine: Machine, images: int) -> str:
    views = config.view.num_views
    lines = [
        f"  {each.tokenizer}: {each.gpu_hours:,.1f} GPU-hours, {each.disk / 1e9:,.1f} GB on disk"
        for each in tokenizations(config, machine, images)
    ]
    return "\n".join([f"Tokens of {views} views an image, {config.tokenizer.precision}", *lines])


def _deadline(best: tuple[Estimate | None, Estimate | None], days: float) -> str:
    cheap, fast = best
    if cheap is not None:
        return f"Cheapest within {days:g} days: {_setting(cheap)}"
    if fast is not None:
        return f"Nothing of this ends within {days:g} days; the fastest: {_setting(fast)}"
    return "Nothing of this fits the memory; more GPUs, ZeRO-3 or another chip"


def _setting(row: Estimate) -> str:
    words = f"train.zero_stage={row.stage} train.micro_batch={row.micro}"
    words += f" train.activation_checkpointing={row.checkpointing}"
    if row.loading.times_read > MUCH:
        words += f" loader.lanes={row.loading.suiting_lanes}"
    return f"{row.gpus} GPUs, {row.days:.2f} days, {row.gpu_hours:,.0f} GPU-hours, {row.kwh:,.0f} kWh\n  {words}"


def _advice(config: Config, machine: Machine, rows: list[Estimate]) -> str:
    """What of the config costs more than it must."""
    lines = []
    if machine.chip.name == "v100" and config.train.precision == "bf16":
        lines.append("a V100 multiplies no bfloat16: train.precision=fp16")
    if config.train.precision == "fp8" and not config.train.compile:
        lines.append("fp8 casts operator by operator without train.compile=true, which takes more than it saves")
    for stage in sorted({row.stage for row in rows if row.stage in (1, 2)}):
        settings = zero_settings(config, stage)
        waits = any(row.step.exposed > 0.1 * row.step.seconds for row in rows if row.stage == stage)
        if waits and not settings.overlap:
            lines.append(
                f"ZeRO-{stage} waits for its gradients: deepspeed.zero_optimization.overlap_comm=true with "
                "deepspeed.zero_optimization.reduce_bucket_size=25000000 sends them beside backward"
            )
    lines += [
        f"on {row.gpus} GPUs checkpoints cost {1 - row.life.survived:.1%} of the time: save every "
        f"{row.life.best_every / row.step.seconds:,.0f} steps (checkpoint.every) for {1 - row.life.best_survived:.2%}"
        for row in _one_each(rows)
        if row.life.survived < row.life.best_survived - 0.01 and math.isfinite(row.life.best_every)
    ]
    counts = dict.fromkeys(row.gpus for row in rows)
    found = [advice(config.loader.lanes, gpus, machine.chip.per_node) for gpus in counts]
    lines += [": ".join(each) for each in found if all(each)]
    starved = [row for row in rows if row.life.starved > 0.05 * row.life.step]
    if starved:
        lines.append(f"on {starved[0].gpus} GPUs the loader is the slower side: more loader.workers or smaller images")
    return "\n".join(["Worth changing", *(f"  {line}" for line in lines)]) if lines else ""


def _assumptions(machine: Machine) -> str:
    """All of them, measured or not; --assume name=number or --from FILE replaces one."""
    lines = ["Assumed (replace by --assume name=number, or what doctor, bench or a run measured: --from FILE|RUN)"]
    for name, value, unit, origin in machine.assumed.lines():
        lines.append(f"  {name:33} {f'{value:.4g}':>9} {unit:9} {origin}")
    return "\n".join(lines)
