"""The head of a report, its headline numbers and its probe. Record in, HTML out; pipeline.reports.curves has the
curves.

Apart from the stage, so that a page of several runs, or of one that is running, can use them. Must not know torch or
any stage.
"""

import math
import statistics

from beitforge.pipeline.reports import components
from beitforge.pipeline.reports.components import Card, Section
from beitforge.pipeline.runs.formatting import duration, number, process_count
from beitforge.pipeline.runs.jsonl import count, value
from beitforge.pipeline.runs.record import RunRecord


def header(record: RunRecord) -> Section:
    """The run's name, how it stands, what it learned in one sentence, and what it is."""
    if record.finished:
        status = "finished"
    elif record.planned_steps:
        status = f"step {record.step:,} of {record.planned_steps:,}"
    else:
        status = "not started"
    where = record.run.resolve()
    return components.header(str(where.parent), where.name, status, record.finished, _claim(record), _what(record))


def _what(record: RunRecord) -> str:
    model, tokenizer, tuned = record.config.model, record.config.tokenizer, record.config.finetune
    encoder = f"{model.layers} layers of width {model.width}, {model.heads} heads"
    if record.job == "tokenizer":
        rows, columns = tokenizer.grid
        return (
            f"dVAE training: images of {tokenizer.input_size} px as {rows} × {columns} tokens of a vocabulary of "
            f"{tokenizer.vocabulary:,}."
        )
    if record.job == "finetune":
        share = "" if tuned.label_share >= 1 else f", {tuned.label_share:.4g} of the labels"
        start = f"from {tuned.init}" if tuned.init else "from drawn weights"
        return f"BEiT fine-tuning {start}: {encoder}; views of {tuned.input_size} px{share}."
    return (
        f"BEiT pretraining: {encoder}; views of {model.input_size} px, {model.num_patches} patches, "
        f"{record.config.mask.num_patches} of them masked; a vocabulary of {tokenizer.vocabulary:,} visual tokens."
    )


def _claim(record: RunRecord) -> str:
    if record.job == "finetune":
        tests = record.kinds.get("test", [])
        right = value(tests[-1], "accuracy") if tests else math.nan
        return f"It names {right:.1%} of {number(value(tests[-1], 'samples'))} test images right." if right >= 0 else ""
    if record.job == "tokenizer":
        return ""
    lines = record.heldout or record.train
    accuracy = value(lines[-1], "masked_accuracy") if lines else math.nan
    if not math.isfinite(accuracy):
        return ""
    images = "images it never trained on" if record.heldout else "training images"
    claim = f"From the visible patches alone, it predicts {accuracy:.1%} of the masked visual tokens of {images}"
    return (
        f"{claim}; always guessing the commonest token gets {record.tokens.majority:.1%}."
        if record.tokens
        else f"{claim}."
    )


def cards(record: RunRecord) -> Section:
    """The headline numbers; a dash where there is none yet."""
    epochs = record.samples_seen / record.epoch_samples if record.epoch_samples else math.nan
    planned = f"of {record.planned_steps:,}, " if record.planned_steps else ""
    starts = len(record.sessions)
    world = f", {process_count(record.sessions[-1].world)}" if starts else ""
    seen = f"{epochs:.4g} epochs of {record.epoch_samples:,} images" if math.isfinite(epochs) else ""
    lasted = f"{starts} {'start' if starts == 1 else 'starts'}{world}"
    own = {"finetune": _finetune_cards, "tokenizer": _tokenizer_cards}.get(record.job, _pretrain_cards)
    return components.cards(
        [
            Card("Steps", f"{record.step:,}", f"{planned}batches of {record.global_batch:,}"),
            Card("Samples seen", f"{record.samples_seen:,}", seen),
            Card("Time running", duration(record.seconds), lasted + _evaluating(record)),
            _speed_card(record.train),
            _loss_card("Training loss", record.train, ""),
            *own(record),
        ]
    )


def _evaluating(record: RunRecord) -> str:
    surveys = record.kinds.get("survey", [])
    share = value(surveys[-1], "share") if surveys else math.nan
    return f"; {share:.1%} of it evaluating" if math.isfinite(share) else ""


def _pretrain_cards(record: RunRecord) -> list[Card]:
    apart = record.heldout
    about = f", {number(value(apart[-1], 'samples'))} images" if apart else "none measured"
    cards = [_loss_card("Held-out loss", apart, about), _accuracy_card(record), _codebook_card(record)]
    judged = [line for line in record.kinds.get("survey", []) if math.isfinite(value(line, "knn"))]
    if judged:
        last, best = judged[-1], max(judged, key=lambda line: value(line, "knn"))
        about = f"on {number(value(last, 'knn_samples'))} labelled images"
        about += (
            f"; best {value(best, 'knn'):.1%} at step {best['step']:,}"
            if value(best, "knn") > value(last, "knn")
            else ""
        )
        cards.append(Card("k-NN accuracy", f"{value(last, 'knn'):.1%}", f"step {last['step']:,}, {about}"))
        cards.append(_targets_card(last))
    return [card for card in cards if card.label]


def _targets_card(survey: dict) -> Card:
    """What the survey says of targets and predictions."""
    used, predicted = value(survey, "targets_perplexity"), value(survey, "predicted_perplexity")
    if not math.isfinite(used + predicted):
        return Card("", "")
    about = f"perplexity of the predictions; of the targets {number(float(f'{used:.4g}'))}"
    return Card("Predicted codes", number(float(f"{predicted:.4g}")), about)


def _finetune_cards(record: RunRecord) -> list[Card]:
    tests = [line for line in record.kinds.get("test", []) if math.isfinite(value(line, "accuracy"))]
    if not tests:
        return [Card("Test accuracy", "–", "none measured"), Card("Test loss", "–")]
    last, best = tests[-1], max(tests, key=lambda line: value(line, "accuracy"))
    five, averages = value(last, "top5"), record.kinds.get("test_ema", [])
    average = value(averages[-1], "accuracy") if averages else math.nan
    decay = record.config.finetune.ema_decay
    about = f"on {number(value(last, 'samples'))} images" + (f"; top 5 {five:.1%}" if math.isfinite(five) else "")
    return [
        Card("Test accuracy", f"{value(last, 'accuracy'):.1%}", about),
        Card("Best test accuracy", f"{value(best, 'accuracy'):.1%}", f"at step {best['step']:,}"),
        _loss_card("Test loss", tests, ""),
        Card("Moving average", f"{average:.1%}", f"test accuracy of the weights' average, decay {decay:g}")
        if math.isfinite(average)
        else Card("", ""),
    ]


def _tokenizer_cards(record: RunRecord) -> list[Card]:
    errors = [value(line, "reconstruction_mse") for line in record.train]
    error = errors[-1] if errors else math.nan
    quality = f"{-10 * math.log10(error):.1f} dB" if error > 0 else "–"
    return [Card("Reconstruction", quality, "PSNR of soft codes, while training"), _codebook_card(record)]


def _loss_card(label: str, lines: list[dict], about: str) -> Card:
    if not lines:
        return Card(label, "–", about)
    first, last = lines[0], lines[-1]
    begun = f"from {value(first, 'loss'):.3f} at step {first['step']:,}"
    return Card(label, f"{value(last, 'loss'):.3f}", f"nats, {begun}{about}")


def _accuracy_card(record: RunRecord) -> Card:
    lines = record.heldout or record.train
    accuracy = f"{value(lines[-1], 'masked_accuracy'):.1%}" if lines else "–"
    about = "on held-out images" if record.heldout else "on training images"
    if record.tokens is not None:
        about += f"; majority token {record.tokens.majority:.1%}"
        about += "" if record.tokens.measured_apart == bool(record.heldout) else " (of the training tokens)"
    return Card("Masked accuracy", accuracy, about)


def _codebook_card(record: RunRecord) -> Card:
    measured, tokens = record.codebook, record.tokens
    used, about = "–", []
    if math.isfinite(value(measured, "perplexity")):
        used = f"{count(measured, 'used'):,} of {count(measured, 'vocabulary'):,}"
        about.append(f"perplexity {value(measured, 'perplexity'):,.0f} as the tokenizer was measured")
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


def _tested(said: dict) -> str:
    """Earlier versions did not write it down."""
    if "tested_apart" not in said:
        return ""
    return ", of a set of their own" if said["tested_apart"] else ", a fifth of the set kept apart"


def _chose(results: dict[str, dict]) -> str:
    if any(result.get("chosen") is False for result in results.values()):
        return "too few to choose features by"
    return "and chose its features by a part of them"


def probe_results(said: dict) -> dict[str, dict]:
    """Those of probe.json that have both numbers, by whose they are."""
    results = said.get("results")
    found = results.items() if isinstance(results, dict) else ()
    both = [(who, each) for who, each in found if isinstance(each, dict)]
    return {
        who: each for who, each in both if math.isfinite(value(each, "knn")) and math.isfinite(value(each, "linear"))
    }


def probe(record: RunRecord) -> Section:
    """The results in probe.json, as bars; empty without them."""
    said = record.probe
    results = probe_results(said)
    if not results:
        return Section("probe", "")
    rows = [(who, [value(result, "linear"), value(result, "knn")]) for who, result in results.items()]
    if math.isfinite(value(said, "majority_class")):
        rows.append(("majority class", [value(said, "majority_class")] * 2))
    chosen = ", ".join(f"{result.get('features', '?')} ({who})" for who, result in results.items())
    tested, fitted = number(value(said, "test_samples")), number(value(said, "train_samples"))
    epochs = f" for {number(value(said, 'epochs'))} epochs" if "epochs" in said else ""
    about = (
        f"Accuracy on {tested} labelled images of {number(value(said, 'classes'))} classes, by the frozen encoder "
        f"of step {number(value(said, 'step'))}{_tested(said)}. The probe is fitted on {fitted} images"
        f"{epochs}, {_chose(results)}: {chosen}."
    )
    return components.section(
        "probe", "What the features are good for", about, components.bars(["", "Linear probe", "k-NN"], rows)
    )
