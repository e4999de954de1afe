"""`evaluate` against transformers and timm: one classifier, the same image files. On the same pixels every image's
logits are theirs and so are the counts; with each library's own preprocessing so is what it names every image that does
not lie at a border between two classes."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import beitforge
from beitforge.pipeline.config.loading import from_dict
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.data.batches import evaluation_batches
from beitforge.pipeline.data.labelled import as_tested
from beitforge.pipeline.stages import export, import_encoder
from beitforge.pipeline.stages.finetune import new_classifier
from beitforge.pipeline.training.objectives import encoder_input
from beitforge.pipeline.weights import export_formats
from beitforge.pipeline.weights.classifier import load_classifier, save_classifier
from beitforge.pipeline.weights.encoder import run_config
from tests.conftest import TINY
from tests.pipeline.commands.test_evaluate import STATE, evaluated, pack

transformers = pytest.importorskip("transformers")
BeitImageProcessorPil = transformers.models.beit.image_processing_pil_beit.BeitImageProcessorPil
pytestmark = [
    pytest.mark.peers("timm"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

CLASSES, EACH, SIZE = 8, 12, 56  # of 64 with 0.875, so that no way of cutting rounds


def write_hues(folder: Path, each: int, seed: int) -> None:
    """Images whose class is the hue of their clouds and stripes, now and then a neighbour's, wide, tall or square."""
    generator = np.random.default_rng(seed)
    for label in range(CLASSES):
        (folder / f"hue{label}").mkdir(parents=True)
        for number in range(each):
            height, width = generator.permutation([128, 32 * generator.integers(4, 7)])
            hue = 2 * math.pi * (label + generator.normal(0, 0.25)) / CLASSES
            tint = 1 + 0.4 * np.cos(hue - np.array([0, 2, 4]) * math.pi / 3)
            stripes = np.sin(generator.uniform(20, 60) * np.arange(width) / width)[None, :, None]
            coarse = Image.fromarray(generator.normal(0, 30, (12, 12)).astype(np.float32))
            clouds = np.asarray(coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC))[..., None]
            pixels = (90 + 25 * stripes + clouds) * tint
            path = folder / f"hue{label}" / f"{number:03d}.png"
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)


def shown(config: Config, where: Path) -> tuple[Tensor, Tensor]:
    """Pixels and labels of a whole set, as fine-tuning's test sees it."""
    source = as_tested(config, str(where), "the set", "a test")
    (batch,) = evaluation_batches(config, source, samples=source.samples, micro=source.samples, rank=0, world=1)
    return encoder_input(config, batch), batch.labels


def right(logits: Tensor, labels: Tensor) -> list[int]:
    """How many have their label first, and among the first five."""
    return [int((logits.topk(k).indices == labels[:, None]).sum()) for k in (1, 5)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """classifier, images (files) and set: the head is fitted to features of other images of the same classes."""
    folder = tmp_path_factory.mktemp("evaluated")
    tune = {"input_size": SIZE, "randaugment": "", "head_scale": 1.0}
    shape = {**TINY["model"], "layers": 3, "width": 64, "heads": 4, "mean": [0.45, 0.4, 0.5], "std": [0.2, 0.3, 0.25]}
    config = from_dict({**TINY, "model": shape, "finetune": tune}, "TINY")
    classifier = new_classifier(config, CLASSES).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in classifier.named_parameters():
            if not name.startswith(("norm.", "head.")):
                parameter.normal_(0, 0.12, generator=generator)
            elif name == "norm.weight":
                parameter.uniform_(0.5, 2, generator=generator)
    write_hues(folder / "fitted", 40, 1)
    write_hues(folder / "images", EACH, 2)
    for name in ("fitted", "images"):
        pack(folder / name, folder / f"{name}.set")
    head, classifier.head = classifier.head, torch.nn.Identity()
    pixels, labels = shown(config, folder / "fitted.set")
    with torch.no_grad():
        features = classifier(pixels)
    wanted = torch.nn.functional.one_hot(labels, CLASSES).double() * 8 - 1
    x = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    solved = torch.linalg.solve(x.T @ x + 0.1 * torch.eye(x.shape[1]), x.T @ wanted).float()
    head.load_state_dict({"weight": solved[:-1].T.contiguous(), "bias": solved[-1]})
    classifier.head = head
    names = tuple(f"hue{label}" for label in range(CLASSES))
    save_classifier(folder / "classifier", classifier.state_dict(), config, names, STATE)
    return folder


def theirs(to: str, folder: Path, image: Image.Image) -> Tensor:
    """Pixels [1, 3, H, W] as the exported folder's own preprocessing makes them."""
    if to == "hf":
        return BeitImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    said = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    side = said["input_size"][
        1
    ]  # as timm.data.transforms_factory.transforms_imagenet_eval; torchvision need not be there
    scale = math.floor(side / said["crop_pct"]) / min(image.size)
    small = image.resize([round(length * scale) for length in image.size], Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in small.size)
    pixels = torch.from_numpy(np.array(small.crop((left, top, left + side, top + side)))).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(said[name])[:, None, None] for name in ("mean", "std"))
    return ((pixels - mean) / std)[None]


@torch.no_grad()
@pytest.mark.parametrize("to", ["hf", "timm"])
def test_what_is_named_right_is_what_the_library_names_right(made, tmp_path, to):
    assert export.run(made / "classifier", tmp_path / "peer", to) == 0
    peer = (export_formats.hf_forward if to == "hf" else export_formats.timm_forward)(tmp_path / "peer")
    found = evaluated(made / "classifier", made / "images.set", tmp_path / "out.json", processes=2)
    loaded, total = load_classifier(made / "classifier"), CLASSES * EACH
    config = loaded.config
    assert found["images"] == total and 0.4 < found["top1"]["share"] < 0.98
    pixels, labels = shown(config, made / "images.set")
    same = peer(pixels, None)
    torch.testing.assert_close(same, loaded.classifier(pixels), rtol=1e-4, atol=1e-4)
    assert right(same, labels) == [found["top1"]["right"], found["top5"]["right"]]
    assert import_encoder.run(tmp_path / "peer", tmp_path / "back", []) == 0
    back = evaluated(tmp_path / "back", made / "images.set", tmp_path / "back.json")
    said = ("weights", "step")  # where it lies, and of which run
    assert {**back, **dict.fromkeys(said)} == {**found, **dict.fromkeys(said)}
    files = [made / "images" / f"{sample.key}.png" for sample in beitforge.open_images(made / "images.set")]
    own = torch.cat([peer(theirs(to, tmp_path / "peer", Image.open(path).convert("RGB")), None) for path in files])
    apart = float((own - same).abs().max())
    assert apart < 0.3 < float(same.std()), "two ways to resize are a level of 255 apart here and there"
    first, second = same.topk(2).values.unbind(dim=1)
    clear = first - second > 2 * apart
    assert clear.float().mean() > 0.7 and torch.equal(own.argmax(dim=1)[clear], same.argmax(dim=1)[clear])


@pytest.mark.parametrize("to", ["hf", "timm", "unilm"])
@pytest.mark.parametrize("crop", [0.9, 1.0])
def test_the_view_of_its_test_comes_back(made, tmp_path, to, crop):
    """A crop of 1 is none in transformers' words: the squeezed whole."""
    loaded = load_classifier(made / "classifier")
    tune = dataclasses.replace(loaded.config.finetune, test_crop=crop)
    config = dataclasses.replace(run_config(made / "classifier"), finetune=tune)
    save_classifier(tmp_path / "ours", loaded.classifier.state_dict(), config, loaded.names, STATE)
    assert export.run(tmp_path / "ours", tmp_path / "peer", to) == 0
    source = tmp_path / "peer" / export_formats.UNILM_FILE if to == "unilm" else tmp_path / "peer"
    assert import_encoder.run(source, tmp_path / "back", []) == 0
    assert run_config(tmp_path / "back").finetune.test_share == pytest.approx(crop, abs=0.5 / SIZE)
