"""The curves of a report: what is logged against the step, for pretraining, fine-tuning and tokenizer training.

Record in, HTML out. Whatever was not measured leaves no chart. Must not know torch or any stage.
"""

import math
import statistics

from beitforge.pipeline.reports import components
from beitforge.pipeline.reports.charts import Series, line_chart
from beitforge.pipeline.reports.components import Block, Section, Tick
from beitforge.pipeline.runs.formatting import duration, number, utc_time
from beitforge.pipeline.runs.jsonl import value
from beitforge.pipeline.runs.record import RunRecord, points

_SPIKY = 20  # a gradient norm this many times its median asks for a logarithmic axis
_LITTLE = 0.02  # nats that do not matter


def curves(record: RunRecord) -> Section:
    """What is logged, against the step, restarts marked; and the time line."""
    if not record.train:
        return components.section("curves", "Curves", "", components.notes(["No step has been logged yet."]))
    if record.job == "finetune":
        large = [_lines(record, "Loss", "loss", "nats", ("train", "test", "test_ema")), _test_chart(record)]
    elif record.job == "tokenizer":
        large = [_lines(record, "Loss", "loss", "", ("train",)), _lines(record, "Squared error", "reconstruction_mse")]
    else:
        large = [_loss_chart(record), _accuracy_chart(record)]
    about = f"Training values are means over {record.config.log.every_steps} steps"
    if record.job == "pretrain" and record.config.model.drop_path > 0 and record.heldout:
        about += ", with drop path; held-out values are without"
    small = _small_charts(record)
    return components.section(
        "curves",
        "Curves",
        f"{about}.",
        time_line(record),
        components.charts(large, large=True),
        components.charts(small),
    )


def _small_charts(record: RunRecord) -> list[str]:
    def single(title: str, name: str, unit: str = "", percent: bool = False, scale: float = 1.0) -> str:
        values = [(x, y * scale) for x, y in points(record.train, name)]
        return _chart(record, title, [Series(name="train", points=values)], unit=unit, percent=percent, zero=True)

    own = []
    if record.job == "tokenizer":
        own = [single("KL to uniform", "kl", "nats"), single("KL of code use", "usage_kl", "nats")]
    return [
        *own,
        single("Learning rate", "lr"),
        *([single("Weight decay", "weight_decay")] if points(record.train, "weight_decay") else []),
        _norm_chart(record),
        single("Throughput", "images_per_second", "images/s"),
        single("Data wait", "data_wait_share", "share of time", percent=True),
        single("Memory", "memory_bytes", "GiB", scale=2**-30),
        single("Model FLOPs utilisation", "mfu", percent=True),
    ]


def _chart(
    record: RunRecord,
    title: str,
    series: list[Series],
    *,
    unit: str = "",
    percent: bool = False,
    zero: bool = False,
    log: bool = False,
    wide: bool = False,
) -> str:
    """Over the steps of the run, restarts marked."""
    marks = [float(session.first_step) for session in record.sessions[1:]]
    return line_chart(
        title,
        series,
        unit=unit,
        marks=marks,
        percent=percent,
        zero=zero,
        log=log,
        wide=wide,
        x_high=float(record.step),
    )


_NAMES = {"train": "train", "heldout": "held-out", "new_view": "new view", "seen_view": "seen view", "test": "test"}
_NAMES |= {"test_ema": "test, moving average"}
_TONES = {"train": 1, "heldout": 2, "new_view": 3, "seen_view": 4, "test": 2, "test_ema": 4}


def _series(record: RunRecord, name: str, kinds: tuple[str, ...]) -> list[Series]:
    """The value by kind of line, kinds without it left out."""
    found = [(kind, points(record.kinds.get(kind, []), name)) for kind in kinds]
    return [Series(name=_NAMES[kind], points=values, tone=_TONES[kind]) for kind, values in found if values]


def _lines(record: RunRecord, title: str, name: str, unit: str = "", kinds: tuple[str, ...] = ("train",)) -> str:
    return _chart(record, title, _series(record, name, kinds), unit=unit, wide=True)


def _loss_chart(record: RunRecord) -> str:
    series = _series(record, "loss", ("train", "heldout"))
    if record.tokens is not None:
        series.append(_level(record, "token frequencies", record.tokens.entropy))
    return _chart(record, "Loss", series, unit="nats", wide=True)


def _accuracy_chart(record: RunRecord) -> str:
    series = _series(record, "masked_accuracy", ("train", "heldout"))
    if record.tokens is not None and series:
        series.append(_level(record, "majority token", record.tokens.majority))
    return _chart(record, "Masked accuracy", series, percent=True, zero=True, wide=True)


def _test_chart(record: RunRecord) -> str:
    """Accuracies of a fine-tuning; those of mixed training images are against the larger label."""
    series = _series(record, "accuracy", ("train", "test", "test_ema"))
    five = points(record.kinds.get("test", []), "top5")
    if five:
        series.append(Series(name="test, top 5", points=five, tone=3))
    return _chart(record, "Accuracy", series, percent=True, zero=True, wide=True)


def _level(record: RunRecord, name: str, height: float) -> Series:
    last = float(record.train[-1]["step"] if record.train else record.step)
    return Series(name=name, points=[(0.0, height), (last, height)], tone=0, dashed=True)


def _norm_chart(record: RunRecord) -> str:
    norms = points(record.train, "gradient_norm")
    sizes = [size for _, size in norms if math.isfinite(size)]
    if not sizes:
        return ""
    clips = {"finetune": record.config.finetune.clip_norm, "tokenizer": 0.0}
    clip = clips.get(record.job, record.config.optimizer.clip_norm)
    series = [Series(name="norm", points=norms)]
    if 0 < clip < 1.5 * max(sizes):
        series.append(_level(record, "clip", clip))
    spiky = max(sizes) > _SPIKY * statistics.median(sizes)
    return _chart(record, "Gradient norm", series, log=spiky, zero=not spiky)


def gaps(record: RunRecord) -> Section:
    """What images and views that were never trained on cost, and what that says of the number of views."""
    kinds = ("seen_view", "new_view", "heldout")
    losses = {kind: dict(points(record.kinds.get(kind, []), "loss")) for kind in kinds}
    views = _difference(losses["new_view"], losses["seen_view"])
    unseen = _difference(losses["heldout"], losses["new_view"])
    if not losses["new_view"] or not (views or unseen):
        return Section("gaps", "")
    series = [
        Series(name="views: new − seen", points=views, tone=3),
        Series(name="images: held-out − new view", points=unseen, tone=2),
        _level(record, "none", 0.0),
    ]
    drawn = [
        _lines(record, "Loss by what is new", "loss", "nats", kinds),
        _chart(record, "What being new costs", [line for line in series if line.points], unit="nats", wide=True),
    ]
    return components.section(
        "gaps", "Generalisation", _gap_words(record, views, unseen), components.charts(drawn, large=True)
    )


def _difference(one: dict[float, float], other: dict[float, float]) -> list[tuple[float, float]]:
    return [(x, one[x] - other[x]) for x in sorted(one.keys() & other.keys())]


def _gap_words(record: RunRecord, views: list[tuple[float, float]], unseen: list[tuple[float, float]]) -> str:
    """The last gaps as sentences."""
    lead = "New view: trained images, cut as they never were in training. Held-out: images it never saw."
    if not views or not math.isfinite(views[-1][1]):
        return lead
    count, (step, cost) = record.config.view.num_views, views[-1]
    more = unseen[-1][1] if unseen else math.nan
    there = f"{lead} At step {step:,.0f} a new view costs {_signed(cost)} nats against one it was trained on"
    there += f", a held-out image {_signed(more)} against a new view" if math.isfinite(more) else ""
    if cost <= _LITTLE:
        return f"{there}: the {count} stored views of an image are enough so far."
    if cost < more:
        return f"{there}: most of the gap is between images, and more than {count} views of each would help little."
    return f"{there}: it memorises the {count} stored views, and more (view.num_views) would help."


def _signed(nats: float) -> str:
    return f"{nats:+.3f}".replace("-", "−")


def survey(record: RunRecord) -> Section:
    """What was looked at inside the run: k-NN, what is predicted, how far attention reaches."""
    lines = record.kinds.get("survey", [])
    if not lines:
        return Section("survey", "")

    def of(*names: tuple[str, str]) -> list[Series]:
        found = [(words, points(lines, name)) for words, name in names]
        kept = [(words, values) for words, values in found if values]
        return [Series(name=words, points=values, tone=tone) for tone, (words, values) in enumerate(kept, start=1)]

    codes = of(("predictions", "predicted_perplexity"), ("targets", "targets_perplexity"))
    used = of(("predictions", "predicted_used"), ("targets", "targets_used"))
    drawn = [
        _chart(record, "k-NN accuracy", of(("k-NN", "knn")), percent=True, zero=True),
        _chart(record, "Entropy of predictions", of(("entropy", "entropy")), unit="nats", zero=True),
        _chart(record, "Codes in use", codes, unit="perplexity", zero=True),
        _chart(record, "Codes that occur", used, zero=True),
        _distance_chart(lines),
    ]
    about = f"{len(lines)} {'survey' if len(lines) == 1 else 'surveys'} inside the run"
    share, samples = value(lines[-1], "share"), value(lines[-1], "knn_samples")
    about += f", {share:.1%} of its time with all evaluations" if math.isfinite(share) else ""
    about += f"; k-NN on {number(samples)} labelled images" if math.isfinite(samples) else ""
    about += (
        ". Attention distance: pixels between a patch and the patches it attends to, weighted by attention, "
        "averaged over heads."
    )
    return components.section("survey", "Representation during training", about, components.charts(drawn))


def _distance_chart(lines: list[dict]) -> str:
    """Layer → pixels, of the first survey that has it and of the last."""

    def by_layer(line: dict) -> list[tuple[float, float]]:
        numbers = sorted(int(name[19:]) for name in line if name[:19] == "attention_distance_" and name[19:].isdigit())
        return [(float(layer), value(line, f"attention_distance_{layer}")) for layer in numbers]

    measured = [line for line in lines if by_layer(line)]
    if not measured:
        return ""
    series = [Series(name=f"step {measured[-1]['step']:,}", points=by_layer(measured[-1]))]
    if len(measured) > 1:
        series.append(Series(name=f"step {measured[0]['step']:,}", points=by_layer(measured[0]), tone=0))
    return line_chart("Attention distance", series, unit="px", zero=True, x_name="layer")


def time_line(record: RunRecord) -> str:
    """When the run was running, evaluated, went back and left updates out; nothing when there is nothing to tell."""
    kinds, sessions = record.kinds, record.sessions
    surveys = [line for line in kinds.get("survey", []) if value(line, "seconds") > 0]
    returns, skips = kinds.get("return", []), kinds.get("skip", [])
    if not sessions or (len(sessions) < 2 and not surveys and not returns and not skips):
        return ""
    start, end = sessions[0].started, sessions[-1].ended
    length = max(end - start, 1e-9)

    def place(time: float) -> float:
        return min(1.0, max(0.0, (time - start) / length))

    blocks = [Block(place(s.started), place(s.ended), "running") for s in sessions]
    for line in surveys:
        ended = value(line, "time")
        blocks.append(Block(place(ended - value(line, "seconds")), place(ended), "evaluating"))
    ticks = [Tick(place(value(line, "time")), "skip", f"update of step {line['step']:,} left out") for line in skips]
    for line in returns:
        text = f"went back to step {value(line, 'to'):,.0f}, went on with step {line['step']:,}"
        ticks.append(Tick(place(value(line, "time")), "return", text))
    said = [f"{len(sessions)} {'start' if len(sessions) == 1 else 'starts'}"]
    said.append(f"{duration(record.seconds)} running in {duration(end - start)}")
    share = value(kinds["survey"][-1], "share") if surveys else math.nan
    said += [f"{share:.1%} of it evaluating"] if math.isfinite(share) else []
    said += [f"{len(skips)} {'update' if len(skips) == 1 else 'updates'} left out"] if skips else []
    said += [f"{len(returns)} {'return' if len(returns) == 1 else 'returns'} to a checkpoint"] if returns else []
    return components.strip(", ".join(said), blocks, ticks, utc_time(start), utc_time(end))
