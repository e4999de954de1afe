"""`export RUN OUT`: a run's newest encoder for others: safetensors, transformers, timm, the released code.

Whatever is written is loaded back, by the library it is for, and must compute what the run's encoder computes;
otherwise nothing appears at OUT. Our own form is written and compared one tensor at a time: memory for the largest
tensor is enough. The libraries hold the whole encoder.
"""

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Config, Model
from beitforge.pipeline.console import say
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.beit import Classifier
from beitforge.pipeline.model.resize import for_finetuning
from beitforge.pipeline.weights import export_formats
from beitforge.pipeline.weights.classifier import (
    classifier_config,
    num_classes,
    refuse_no_classifier,
    stream_classifier,
)
from beitforge.pipeline.weights.encoder import (
    Trained,
    build_encoder,
    class_names,
    fine_tuned,
    refuse_others,
    run_config,
    stream_encoder,
    trained_weights,
    written_as_read,
)
from beitforge.shards.storage.staging import staged_folder

FORMATS = ("safetensors", "hf", "timm", "unilm")
_AGREES = 1e-5  # largest difference of logits, as a share of the largest logit: float32 rounding over all layers


def run(
    run_folder: Path,
    out: Path,
    to: str = "safetensors",
    finetune: bool = False,
    size: Size | None = None,
    average: bool = False,
) -> int:
    """Write OUT; returns the exit code. `finetune`: a classifier without its head, for images of `size`. average: the
    moving average of the weights."""
    config = run_config(run_folder)
    weights = trained_weights(run_folder, average=average)
    classifies = fine_tuned(run_folder)
    if classifies and finetune:
        raise ConfigError(f"{run_folder} holds a classifier, which is exported with its head: leave --finetune out")
    if size is not None and not finetune:
        raise ConfigError("--input-size goes with --finetune: a pretraining export keeps the size it was trained at")
    if finetune and to == "safetensors":
        raise ConfigError(
            "--finetune is for --to hf, timm or unilm; safetensors are the pretraining weights as they are"
        )
    out = out.resolve()
    if out == run_folder.resolve():
        raise ConfigError(f"{out} is what is exported: give another folder to write to")
    with staged_folder(out, "export", replace=True) as folder:
        if to == "safetensors":
            checked = _stream(folder, weights, config, run_folder, classifies)
        elif classifies:
            checked = _agreed(to, _write_tuned(folder, to, weights, config, class_names(run_folder)))
        elif finetune:
            checked = _agreed(to, _write_classifier(folder, to, weights, config.model, size or config.model.input_size))
        else:
            checked = _agreed(to, _write_encoder(folder, to, weights, config, run_folder))
    numbers = sum(math.prod(shape) for shape in weights.shapes.values())
    say(f"exported step {weights.state.step} ({numbers:,} parameters) to {out} as {to}; loaded back, {checked}")
    return 0


def _stream(folder: Path, weights: Trained, config: Config, source: Path, classifies: bool) -> str:
    """Write and read our own form, one tensor in memory at a time; returns what the comparison found."""
    if classifies:
        refuse_no_classifier(config, weights.shapes, source)
        stream_classifier(folder, weights, config, class_names(source))
    else:
        refuse_others(config, weights.shapes, source)
        stream_encoder(folder, weights, config)
    if not written_as_read(folder, weights):
        raise ConfigError(
            f"what was read back from {folder} is not what was written: check the disk, then export again"
        )
    return "it is the checkpoint's weights bit for bit"


def _agreed(to: str, largest: float) -> str:
    """What a comparison of logits found. Raises ConfigError when they differ."""
    if not largest <= _AGREES:
        raise ConfigError(
            f"{to}: what was written computes logits that differ by {largest:.2g} of the largest, more than "
            f"{_AGREES:.0g}: not exported; please report it"
        )
    return f"its logits differ by at most {largest:.1e} of the largest"


@torch.no_grad()
def _write_encoder(folder: Path, to: str, found: Trained, config: Config, source: Path) -> float:
    """Write the pretraining encoder; returns the largest difference of its logits, a share of the largest."""
    model, vocabulary, weights = config.model, config.tokenizer.vocabulary, found.all()
    ours = build_encoder(config, weights, source)
    pixels, mask = _example(model)
    if to == "hf":
        export_formats.write_hf(folder, weights, model, vocabulary)
        return _difference(ours.all_logits(pixels, mask), export_formats.hf_forward(folder)(pixels, mask))
    if to == "timm":
        export_formats.write_timm(folder, weights, model, vocabulary)
        theirs = export_formats.timm_forward(folder)
    else:
        export_formats.write_unilm(folder, weights, model, vocabulary)
        theirs = export_formats.unilm_forward(folder, model, vocabulary)
    return _difference(ours.all_logits(pixels, None), theirs(pixels, None))


def _write_classifier(folder: Path, to: str, weights: Trained, model: Model, size: Size) -> float:
    """Write the fine-tuning form; returns the largest difference of its features, a share of the largest."""
    if any(side % model.patch_size for side in size):
        raise ConfigError(f"--input-size {size} is not a multiple of the patch size {model.patch_size}")
    ready, target = for_finetuning(weights.all(), model, size)
    return _write_peer(folder, to, ready, target, export_formats.ClassifierHead())


def _write_tuned(folder: Path, to: str, weights: Trained, config: Config, names: tuple[str, ...]) -> float:
    """Write a fine-tuned classifier with its head; returns the largest difference of its logits, likewise."""
    model = dataclasses.replace(classifier_config(config, weights.shapes).model, drop_path=config.finetune.drop_path)
    tune = config.finetune
    head = export_formats.ClassifierHead(num_classes(weights.shapes), names, tune.test_share, tune.pooling)
    return _write_peer(folder, to, weights.all(), model, head)


@torch.no_grad()
def _write_peer(
    folder: Path, to: str, weights: dict[str, Tensor], model: Model, head: export_formats.ClassifierHead
) -> float:
    ours = Classifier(dataclasses.replace(model, kernels="auto"), head.classes, head.pooling)
    ours.load_state_dict(weights)
    pixels, _ = _example(model)
    if to == "hf":
        export_formats.write_hf(folder, weights, model, 0, head)
        theirs = export_formats.hf_forward(folder)
    elif to == "timm":
        export_formats.write_timm(folder, weights, model, 0, head)
        theirs = export_formats.timm_forward(folder)
    else:
        export_formats.write_unilm(folder, weights, model, 0, head)
        theirs = export_formats.unilm_forward(folder, model, 0, head)
    return _difference(ours.eval()(pixels), theirs(pixels, None))


def _example(model: Model) -> tuple[Tensor, Tensor]:
    """Two images of noise, normalised, and a mask each."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, *model.input_size, generator=generator)
    return pixels, torch.rand(2, model.num_patches, generator=generator) < 0.4


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / ours.abs().max())
