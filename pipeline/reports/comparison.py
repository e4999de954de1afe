"""Several runs on one page: what differs in their settings, their numbers side by side, a line of each in every chart.

Records in, HTML out; runs may be of different length and kind. Must not know torch or any stage.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from beitforge.pipeline.config.loading import to_dict
from beitforge.pipeline.reports import components
from beitforge.pipeline.reports.charts import Series, line_chart
from beitforge.pipeline.reports.components import Section
from beitforge.pipeline.reports.summary import data_wait, probe_results
from beitforge.pipeline.runs.formatting import duration, number, utc_time
from beitforge.pipeline.runs.jsonl import value
from beitforge.pipeline.runs.record import RunRecord, points

_TONES = 6  # colours of lines; they repeat after this many
_COMMIT = 12  # digits that tell one from another
_ELSEWHERE = ("train.run", "finetune.run")  # where a run lies is its name


def sections_of(records: Sequence[RunRecord]) -> list[Section]:
    """The sections in order, without empty ones: head, notes (what could not be read), differences, numbers, curves and
    footer."""
    names = names_of([record.run for record in records])
    said = [f"{name}: {line}" for name, record in zip(names, records, strict=True) for line in record.notes]
    sections = [
        components.header(
            "beitforge", " · ".join(names), f"{len(records)} runs", True, "What differs, and what came of it."
        ),
        components.section("notes", "", "", components.notes(said)),
        _differences(names, records),
        _numbers(names, records),
        _curves(names, records),
        components.footer(f"Written {utc_time(time.time())} by beitforge."),
    ]
    return [section for section in sections if section.html]


def names_of(runs: Sequence[Path]) -> list[str]:
    """The folders' own names, with as many parents before them as it takes to tell them apart."""
    parts = [run.resolve().parts for run in runs]
    names = [part[-1] for part in parts]
    for length in range(2, max(map(len, parts)) + 1):
        clashing = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(part[-length:]) if name in clashing else name for name, part in zip(names, parts, strict=True)
        ]
    return names


def _differences(names: list[str], records: Sequence[RunRecord]) -> Section:
    """The settings, and what of the machines, that are not the same everywhere."""
    flat = [settings(record) for record in records]
    keys = list(dict.fromkeys(key for each in flat for key in each))
    rows = []
    for key in keys:
        cells = [each.get(key, "–") for each in flat]
        told = [cell for cell in cells if cell != "–"]  # a setting of one job alone is no difference
        if len(set(told if "." in key else cells)) > 1:
            rows.append([key, *cells])
    if not rows:
        return components.section("differences", "What differs", "", components.notes(["All settings are the same."]))
    about = "Settings and machines that are not the same everywhere."
    return components.section(
        "differences", "What differs", about, components.card(components.table(["", *names], rows))
    )


def settings(record: RunRecord) -> dict[str, str]:
    """Everything a run was told, and what it ran on, as text by name. What another job would be told is left out."""
    tree = to_dict(record.config)
    if record.job != "finetune":
        tree.pop("finetune")
    found = {"job": record.job}
    for section, values in tree.items():
        for name, content in values.items():
            if f"{section}.{name}" not in _ELSEWHERE:
                found[f"{section}.{name}"] = "none" if content == "" else str(content)
    environment = record.environment
    for name in ("host", "device", "world", "cpus"):
        if name in environment:
            found[name] = str(environment[name])
    if "commit" in environment:
        found["commit"] = str(environment["commit"])[:_COMMIT]
    versions = environment.get("versions", {})
    found |= {str(name): str(version) for name, version in versions.items()} if isinstance(versions, dict) else {}
    return found


def _last(record: RunRecord, kind: str, name: str) -> float:
    """The last value that was measured; NaN for none."""
    values = [y for _, y in points(record.kinds.get(kind, []), name) if math.isfinite(y)]
    return values[-1] if values else math.nan


def _extreme(record: RunRecord, kind: str, name: str, choose: Callable) -> float:
    values = [y for _, y in points(record.kinds.get(kind, []), name) if math.isfinite(y)]
    return choose(values) if values else math.nan


def _speed(record: RunRecord) -> float:
    return _extreme(record, "train", "images_per_second", statistics.median)


def _waiting(record: RunRecord) -> float:
    both = [(value(line, "images_per_second"), value(line, "data_wait_share")) for line in record.train]
    both = [(speed, wait) for speed, wait in both if math.isfinite(wait) and 0 < speed < math.inf]
    return data_wait(both) if both else math.nan


def _probed(record: RunRecord, name: str) -> float:
    return value(probe_results(record.probe).get("trained", {}), name)


def _share(of: float) -> str:
    return f"{of:.1%}"


def _nats(of: float) -> str:
    return f"{of:.3f}"


def _count(of: float) -> str:
    return number(float(f"{of:.4g}")) if of < 1e4 else f"{of:,.0f}"


# what a row is called, how to read it off a record, how to write it, and which of several is the best
_ROWS: tuple[tuple[str, Callable[[RunRecord], float], Callable[[float], str], Callable | None], ...] = (
    ("steps", lambda record: float(record.step), _count, None),
    ("samples seen", lambda record: float(record.samples_seen), _count, None),
    ("time running", lambda record: record.seconds, duration, None),
    ("starts", lambda record: float(len(record.sessions)), _count, None),
    ("images/s, median", _speed, _count, max),
    ("waiting for data", _waiting, _share, min),
    ("memory, GiB", lambda record: _extreme(record, "train", "memory_bytes", max) / 2**30, _count, None),
    ("training loss", lambda record: _last(record, "train", "loss"), _nats, None),
    ("held-out loss", lambda record: _last(record, "heldout", "loss"), _nats, min),
    ("held-out loss, best", lambda record: _extreme(record, "heldout", "loss", min), _nats, min),
    ("held-out masked accuracy", lambda record: _last(record, "heldout", "masked_accuracy"), _share, max),
    ("k-NN inside the run", lambda record: _last(record, "survey", "knn"), _share, max),
    ("images the probe was fitted on", lambda record: value(record.probe, "train_samples"), _count, None),
    ("images it was tested on", lambda record: value(record.probe, "test_samples"), _count, None),
    ("linear probe", lambda record: _probed(record, "linear"), _share, max),
    ("k-NN probe", lambda record: _probed(record, "knn"), _share, max),
    ("test loss", lambda record: _last(record, "test", "loss"), _nats, min),
    ("test accuracy", lambda record: _last(record, "test", "accuracy"), _share, max),
    ("test accuracy, best", lambda record: _extreme(record, "test", "accuracy", max), _share, max),
    ("test accuracy of the average", lambda record: _last(record, "test_ema", "accuracy"), _share, max),
)


def _alike(title: str, records: Sequence[RunRecord]) -> bool:
    """Whether a row's values can be compared: probes that were fitted and tested on as many images."""
    sizes = {(value(r.probe, "train_samples"), value(r.probe, "test_samples")) for r in records if r.probe}
    return title not in ("linear probe", "k-NN probe") or len(sizes) == 1


def _numbers(names: list[str], records: Sequence[RunRecord]) -> Section:
    """The headline numbers, where anybody has them; the best of a row is set bold."""
    rows: list[list[str]] = []
    strong: set[tuple[int, int]] = set()
    for title, of, words, best in _ROWS:
        values = [of(record) for record in records]
        finite = [y for y in values if math.isfinite(y)]
        if not finite:
            continue
        if best is not None and len(set(finite)) > 1 and _alike(title, records):
            strong |= {(len(rows), 1 + i) for i, y in enumerate(values) if y == best(finite)}
        rows.append([title, *(words(y) if math.isfinite(y) else "–" for y in values)])
    about = "Last values unless said otherwise; the best of a row is bold."
    return components.section(
        "numbers", "Side by side", about, components.card(components.table(["", *names], rows, strong))
    )


# title, kind of line, value, unit, whether a share, factor, whether the axis begins at 0
_CHARTS = (
    ("Training loss", "train", "loss", "nats", False, 1.0, False),
    ("Held-out loss", "heldout", "loss", "nats", False, 1.0, False),
    ("Training masked accuracy", "train", "masked_accuracy", "", True, 1.0, True),
    ("Held-out masked accuracy", "heldout", "masked_accuracy", "", True, 1.0, True),
    ("Loss of a new view", "new_view", "loss", "nats", False, 1.0, False),
    ("k-NN accuracy", "survey", "knn", "", True, 1.0, True),
    ("Entropy of predictions", "survey", "entropy", "nats", False, 1.0, True),
    ("Test loss", "test", "loss", "nats", False, 1.0, False),
    ("Test accuracy", "test", "accuracy", "", True, 1.0, True),
    ("Test accuracy of the moving average", "test_ema", "accuracy", "", True, 1.0, True),
    ("Squared error", "train", "reconstruction_mse", "", False, 1.0, True),
    ("Learning rate", "train", "lr", "", False, 1.0, True),
    ("Gradient norm", "train", "gradient_norm", "", False, 1.0, True),
    ("Throughput", "train", "images_per_second", "images/s", False, 1.0, True),
    ("Data wait", "train", "data_wait_share", "share of time", True, 1.0, True),
    ("Memory", "train", "memory_bytes", "GiB", False, 2.0**-30, True),
)


def _curves(names: list[str], records: Sequence[RunRecord]) -> Section:
    """One line per run. Where batch sizes differ the axis counts samples, since steps cannot be compared."""
    by_step = len({record.global_batch for record in records}) == 1
    factors = [1 if by_step else record.global_batch for record in records]
    end = float(max(record.step * factor for record, factor in zip(records, factors, strict=True)))
    drawn = []
    for title, kind, name, unit, percent, scale, zero in _CHARTS:
        series = []
        for i, (record, factor) in enumerate(zip(records, factors, strict=True)):
            found = [(x * factor, y * scale) for x, y in points(record.kinds.get(kind, []), name)]
            series += [Series(name=names[i], points=found, tone=1 + i % _TONES)] if found else []
        drawn.append(
            line_chart(
                title,
                series,
                unit=unit,
                percent=percent,
                zero=zero,
                wide=True,
                named=True,
                x_name="step" if by_step else "sample",
                x_high=end,
            )
        )
    about = "" if by_step else "Over samples seen, since the batches are of different size."
    return components.section("curves", "Curves", about, components.charts(drawn, large=True))
