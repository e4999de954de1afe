"""The sections of a report that come from a run's record: head, headline numbers, probe, curves. Record in, HTML out.

Apart from the stage, so that a page of several runs, or of one that is running, can use them. Must not know torch or
any stage.
"""

import math
import statistics
import time

from pipeline import page
from pipeline.chart import Series, line_chart, number
from pipeline.page import Card
from pipeline.record import Record

_SPIKY = 20  # a gradient norm so many times its median asks for a logarithmic axis


def header(record: Record) -> str:
    """The run's name, how it stands, what it learned in one sentence, and what it is."""
    model, tokenizer = record.config.model, record.config.tokenizer
    if record.finished:
        status = "finished"
    elif record.planned_steps:
        status = f"unfinished: step {record.step:,} of {record.planned_steps:,}"
    else:
        status = "unfinished: not started"
    patches = model.num_patches
    what = (
        f"BEiT pretraining: {model.layers} layers of width {model.width}, {model.heads} heads; views of "
        f"{model.input_size} px, {patches} patches, {record.config.mask.num_patches} of them masked; a vocabulary of "
        f"{tokenizer.vocabulary:,} visual tokens."
    )
    where = record.run.resolve()
    return page.header(str(where.parent), where.name, status, record.finished, _claim(record), what)


def _claim(record: Record) -> str:
    lines = record.heldout or record.train
    accuracy = value(lines[-1], "masked_accuracy") if lines else math.nan
    if not math.isfinite(accuracy):
        return ""
    pictures = "pictures it never trained on" if record.heldout else "training pictures"
    claim = f"From the visible patches alone, it predicts {accuracy:.1%} of the masked visual tokens of {pictures}"
    return (
        f"{claim}; always guessing the commonest token gets {record.tokens.majority:.1%}."
        if record.tokens
        else f"{claim}."
    )


def cards(record: Record) -> str:
    """The headline numbers; a dash where there is none yet."""
    epochs = record.samples_seen / record.epoch_samples if record.epoch_samples else math.nan
    planned = f"of {record.planned_steps:,}, " if record.planned_steps else ""
    starts = len(record.sessions)
    world = f", {record.sessions[-1].world} processes" if starts else ""
    apart = record.heldout
    return page.cards(
        [
            Card("Steps", f"{record.step:,}", f"{planned}batches of {record.config.train.global_batch:,}"),
            Card(
                "Samples seen",
                f"{record.samples_seen:,}",
                f"{epochs:.4g} epochs of {record.epoch_samples:,} pictures" if math.isfinite(epochs) else "",
            ),
            Card("Time running", duration(record.seconds), f"{starts} {'start' if starts == 1 else 'starts'}{world}"),
            _speed_card(record.train),
            _loss_card("Training loss", record.train, ""),
            _loss_card(
                "Held-out loss",
                apart,
                f", {number(value(apart[-1], 'samples'))} pictures" if apart else "none measured",
            ),
            _accuracy_card(record),
            _codebook_card(record),
        ]
    )


def _loss_card(label: str, lines: list[dict], about: str) -> Card:
    if not lines:
        return Card(label, "–", about)
    first, last = lines[0], lines[-1]
    begun = f"from {value(first, 'loss'):.3f} at step {first['step']:,}"
    return Card(label, f"{value(last, 'loss'):.3f}", f"nats, {begun}{about}")


def _accuracy_card(record: Record) -> Card:
    lines = record.heldout or record.train
    accuracy = f"{value(lines[-1], 'masked_accuracy'):.1%}" if lines else "–"
    about = "on held-out pictures" if record.heldout else "on training pictures"
    if record.tokens is not None:
        about += f"; majority token {record.tokens.majority:.1%}"
        about += "" if record.tokens.measured_apart == bool(record.heldout) else " (of the training tokens)"
    return Card("Masked accuracy", accuracy, about)


def _codebook_card(record: Record) -> Card:
    measured, tokens = record.codebook, record.tokens
    used, about = "–", []
    if {"used", "vocabulary", "perplexity"} <= measured.keys():
        used = f"{measured['used']:,} of {measured['vocabulary']:,}"
        about.append(f"perplexity {measured['perplexity']:,.0f} as the tokenizer was measured")
    if tokens is not None:
        used = f"{tokens.used:,} of {tokens.vocabulary:,}"
        about.insert(0, f"perplexity {tokens.perplexity:,.0f} in the token set")
    return Card("Codebook use", used, "; ".join(about).replace("; perplexity", ","))


def _speed_card(train: list[dict]) -> Card:
    both = [(value(line, "images_per_second"), value(line, "data_wait_share")) for line in train]
    both = [(speed, wait) for speed, wait in both if math.isfinite(wait) and 0 < speed < math.inf]
    if not both:
        return Card("Speed", "–", "")
    median = statistics.median(speed for speed, _ in both)
    about = f"images/s, median; {data_wait(both):.1%} of the time waiting for data"
    used = [flops for flops in (value(line, "mfu") for line in train) if math.isfinite(flops)]
    memory = [size for size in (value(line, "memory_bytes") for line in train) if math.isfinite(size)]
    about += f"; MFU {statistics.median(used):.1%}" if used else ""
    about += f"; {max(memory) / 2**30:.1f} GiB of memory" if memory else ""
    return Card("Speed", number(float(f"{median:.4g}")), about)


def data_wait(speeds_and_waits: list[tuple[float, float]]) -> float:
    """The share of all time spent waiting, from intervals of equal samples: their length goes with 1 / speed."""
    return sum(wait / speed for speed, wait in speeds_and_waits) / sum(1 / speed for speed, _ in speeds_and_waits)


def probe(record: Record) -> str:
    """What probe.json says, as bars; nothing without it."""
    said = record.probe
    results = {who: result for who, result in said.get("results", {}).items() if {"knn", "linear"} <= result.keys()}
    if not results:
        return ""
    rows = [(who, [float(result["linear"]), float(result["knn"])]) for who, result in results.items()]
    if "majority_class" in said:
        rows.append(("majority class", [float(said["majority_class"])] * 2))
    chosen = ", ".join(f"{result.get('features', '?')} ({who})" for who, result in results.items())
    tested, fitted = number(value(said, "test_samples")), number(value(said, "train_samples"))
    about = (
        f"Accuracy on {tested} labelled pictures of {number(value(said, 'classes'))} classes, by the frozen encoder "
        f"of step {number(value(said, 'step'))}. The probe is fitted on {fitted} pictures, and chose its features by a "
        f"part of them: {chosen}."
    )
    return page.section("probe", "What the features are good for", about, page.bars(["", "Linear probe", "k-NN"], rows))


def curves(record: Record) -> str:
    """What is logged, against the step, restarts marked; and the time line of a run started more than once."""
    train = record.train
    if not train:
        return page.section("curves", "Curves", "", page.notes(["No step has been logged yet."]))
    marks = [float(session.first_step) for session in record.sessions[1:]]

    def single(title: str, name: str, unit: str = "", percent: bool = False) -> str:
        series = [Series(name="train", points=points(train, name))]
        return line_chart(title, series, unit=unit, marks=marks, percent=percent, zero=True)

    drawn = [
        _loss_chart(record, marks),
        _accuracy_chart(record, marks),
        single("Learning rate", "lr"),
        _norm_chart(record, marks),
        single("Throughput", "images_per_second", "images/s"),
        single("Data wait", "data_wait_share", "share of time", percent=True),
    ]
    about = f"Training values are means over {record.config.log.every_steps} steps"
    if record.config.model.drop_path > 0 and record.heldout:
        about += ", with drop path; held-out values are without"
    return page.section("curves", "Curves", f"{about}.", time_line(record), page.charts(drawn))


def _loss_chart(record: Record, marks: list[float]) -> str:
    series = _train_and_heldout(record, "loss")
    if record.tokens is not None:
        series.append(_level(record, "token frequencies", record.tokens.entropy))
    return line_chart("Loss", series, unit="nats", marks=marks, wide=True)


def _accuracy_chart(record: Record, marks: list[float]) -> str:
    series = _train_and_heldout(record, "masked_accuracy")
    if record.tokens is not None and any(line.points for line in series):
        series.append(_level(record, "majority token", record.tokens.majority))
    return line_chart("Masked accuracy", series, marks=marks, percent=True, zero=True, wide=True)


def _train_and_heldout(record: Record, name: str) -> list[Series]:
    return [
        Series(name="train", points=points(record.train, name)),
        Series(name="held-out", points=points(record.heldout, name), tone=2),
    ]


def _level(record: Record, name: str, height: float) -> Series:
    last = float(record.train[-1]["step"])
    return Series(name=name, points=[(0.0, height), (last, height)], tone=0, dashed=True)


def _norm_chart(record: Record, marks: list[float]) -> str:
    norms = points(record.train, "gradient_norm")
    sizes = [size for _, size in norms if math.isfinite(size)]
    if not sizes:
        return ""
    series, clip = [Series(name="norm", points=norms)], record.config.optimizer.clip_norm
    if 0 < clip < 1.5 * max(sizes):
        series.append(_level(record, "clip", clip))
    spiky = max(sizes) > _SPIKY * statistics.median(sizes)
    return line_chart("Gradient norm", series, marks=marks, log=spiky, zero=not spiky)


def time_line(record: Record) -> str:
    """When the run was running; nothing when it was started once."""
    if len(record.sessions) < 2:
        return ""
    start, end = record.sessions[0].started, record.sessions[-1].ended
    length = max(end - start, 1e-9)
    blocks = [((s.started - start) / length, (s.ended - start) / length) for s in record.sessions]
    title = f"{len(blocks)} starts, {duration(record.seconds)} running in {duration(end - start)}"
    return page.strip(title, blocks, clock(start), clock(end))


def points(lines: list[dict], name: str) -> list[tuple[float, float]]:
    """(step, value) of the lines that have the value."""
    return [(float(line["step"]), value(line, name)) for line in lines if name in line]


def value(line: dict, name: str) -> float:
    """A number of a line; NaN when it is missing or none."""
    found = line.get(name)
    return float(found) if isinstance(found, int | float) else math.nan


def duration(seconds: float) -> str:
    """3 d 4 h · 2 h 5 min · 4 min 10 s · 7 s."""
    total = round(max(0.0, seconds))
    for length, unit, part, part_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if total >= length:
            return f"{total // length} {unit} {total % length // part} {part_unit}"
    return f"{total} s"


def clock(seconds: float) -> str:
    """A time since 1970 as date and time, UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
