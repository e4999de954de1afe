"""Ten steps of our fine-tuning against ten of a plain loop around transformers' classifier, from one export: layer-wise
rates as published, no code of ours but the batches and the exported weights."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.data.batches import training_batches
from beitforge.pipeline.data.labelled import num_classes, supervised
from beitforge.pipeline.data.pretraining import image_set
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.model.dropout import dropped
from beitforge.pipeline.runs.checkpoints import State
from beitforge.pipeline.runs.jsonl import read_metrics
from beitforge.pipeline.stages import export
from beitforge.pipeline.stages.finetune import new_classifier
from beitforge.pipeline.training.objectives import encoder_input
from beitforge.pipeline.weights.conversion import from_hf
from beitforge.pipeline.weights.encoder import save_encoder
from beitforge.pipeline.weights.export_formats import UNILM_FILE
from tests.peers.test_training import published_schedule
from tests.pipeline.training.test_trainer import trained, weights

transformers = pytest.importorskip("transformers")
BeitImageProcessorPil = transformers.models.beit.image_processing_pil_beit.BeitImageProcessorPil
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

STEPS, DECAY, DROPOUT, ATTENTION_DROPOUT = 10, 0.65, 0.1, 0.2
SETTINGS = [
    "finetune.input_size=48",  # another window: tables are laid on it
    "finetune.duration=10 steps",
    "finetune.global_batch=8",
    "finetune.micro_batch=4",
    "finetune.lr=2e-3",
    "finetune.lr_end=1e-5",
    "finetune.warmup=4 steps",
    f"finetune.layer_decay={DECAY}",
    "finetune.drop_path=0",
    "finetune.head_scale=1",
    "finetune.randaugment=",
    "finetune.erase=0",
    "finetune.mixup=0",
    "finetune.cutmix=0",
    "log.every_steps=1",
    "log.tensorboard=false",
]


@pytest.fixture(scope="module")
def encoder(tiny, tmp_path_factory) -> Path:
    """An encoder whose bias tables, zero when drawn, are not."""
    config = load_config(str(tiny.config), [])
    beit = Beit(config.model, config.tokenizer.vocabulary, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in beit.named_parameters():
            if name.endswith(("table", "bias")):
                parameter.normal_(0, 0.1, generator=generator)
    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    state = State(step=0, samples_seen=0, world=1, zero_stage=0, precision="fp32", images="", tokens="", config="")
    save_encoder(folder, beit.state_dict(), config, state)
    return folder


@pytest.fixture(scope="module")
def tuned(tiny, encoder, tmp_path_factory) -> Path:
    """A fine-tuning run of two steps."""
    run, images = tmp_path_factory.mktemp("tuned") / "run", load_config(str(tiny.config), []).data.images
    settings = [*SETTINGS, f"data.labelled_images={images}", f"finetune.init={encoder}", "finetune.duration=2 steps"]
    trained(tiny, run, *settings, processes=1, verb="finetune")
    return run


def published_groups(peer: torch.nn.Module, layers: int) -> list[dict]:
    """unilm, beit/optim_factory.py: get_num_layer_for_vit, LayerDecayValueAssigner and get_parameter_groups."""
    groups = []
    for name, parameter in peer.named_parameters():
        number = layers + 1
        if ".layer." in name or ".layers." in name:
            number = int(name.replace(".layers.", ".layer.").split(".layer.")[1].split(".")[0]) + 1
        elif "embeddings" in name:
            number = 0
        free = parameter.dim() == 1 or name.endswith((".bias", "position_embeddings", "cls_token"))
        scale = DECAY ** (layers + 1 - number)
        groups.append({"params": [parameter], "weight_decay": 0.0 if free else 0.05, "scale": scale})
    return groups


@contextlib.contextmanager
def same_dropout(seeds: torch.Tensor | None) -> Iterator[None]:
    """torch's dropout, of whatever number at whatever place the peer applies it, by our draws: first on the embedding,
    then in each layer on the probabilities, what attention puts out and what the MLP does."""
    asked = []

    def dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        assert training and not inplace
        if p and seeds is not None:
            layer, where = divmod(max(0, len(asked) - 1), 3)
            x = dropped(x, p, seeds, 4 * layer + (where + 1 if asked else 0))
        asked.append(p)
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", dropout)
        yield
    assert seeds is None or asked == [DROPOUT, *[ATTENTION_DROPOUT, DROPOUT, DROPOUT] * ((len(asked) - 1) // 3)]


def peer_training(config, encoder: Path, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of ten steps, and the weights then, under our names."""
    assert export.run(encoder, folder, "hf", finetune=True, size=config.finetune.input_size) == 0
    source = supervised(config)
    classes, smoothing = num_classes(source.stream.images), config.finetune.smoothing
    mean = config.finetune.pooling == "mean"
    peer = transformers.BeitForImageClassification.from_pretrained(
        folder,
        num_labels=classes,
        attn_implementation="eager",
        drop_path_rate=0.0,
        hidden_dropout_prob=config.finetune.dropout,
        attention_probs_dropout_prob=config.finetune.attention_dropout,
        use_mean_pooling=mean,
    ).train()
    if not mean:  # the released code goes on with the norm of the pretraining
        pretrained = load_file(encoder / "model.safetensors")
        peer.beit.layernorm.load_state_dict({name: pretrained[f"norm.{name}"] for name in ("weight", "bias")})
    head = new_classifier(config, classes).head
    peer.classifier.load_state_dict(head.state_dict())
    adamw = torch.optim.AdamW(published_groups(peer, config.model.layers), lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    batches = training_batches(config, source, first_sample=0, global_batch=8, micro=8, rank=0, world=1, steps=STEPS)
    losses, before = [], [parameter.detach().clone() for parameter in peer.parameters()]
    decays = np.linspace(0, 1, STEPS, endpoint=False)
    first, last = config.finetune.weight_decay, config.finetune.last_weight_decay
    decays = last + 0.5 * (first - last) * (1 + np.cos(np.pi * decays))  # unilm, beit/utils.py: cosine_scheduler
    for batch, rate, decay in zip(batches, published_schedule(), decays, strict=True):
        with same_dropout(batch.draws.get("dropout")):
            out = peer(encoder_input(config, batch), labels=batch.labels)
        loss = F.cross_entropy(out.logits, batch.labels, label_smoothing=smoothing) if smoothing else out.loss
        loss.backward()
        for group in adamw.param_groups:
            group["lr"] = rate * group["scale"]
            if group["weight_decay"] > 0:  # unilm, beit/engine_for_finetuning.py
                group["weight_decay"] = decay
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    moved = [float((after.detach() - old).abs().max()) for after, old in zip(peer.parameters(), before, strict=True)]
    assert min(moved) > 1e-3, "a weight that does not move compares nothing"
    peer.save_pretrained(folder / "after")
    renamed = from_hf(load_file(folder / "after" / "model.safetensors"))
    swapped = (("beit.pooler.layernorm.", "norm."), ("beit.layernorm.", "norm."), ("classifier.", "head."))
    for theirs, ours in swapped:
        renamed = {name.replace(theirs, ours): tensor for name, tensor in renamed.items()}
    return losses, renamed


OTHER = ["finetune.pooling=cls", "finetune.weight_decay_end=0.9", "finetune.init_truncation=100"]
OTHER += [f"finetune.dropout={DROPOUT}", f"finetune.attention_dropout={ATTENTION_DROPOUT}"]


@pytest.mark.parametrize(
    ("stage", "smoothing", "more"), [(0, 0.0, []), (1, 0.1, OTHER), (2, 0.1, []), (3, 0.1, OTHER), (0, 0.1, OTHER)]
)
def test_ten_steps_are_transformers(tiny, encoder, tmp_path, stage, smoothing, more):
    """With the defaults, and with the class token, a weight decay that rises, weights that are not truncated, and
    dropout of the same numbers at the same places."""
    run = tmp_path / "run"
    images = load_config(str(tiny.config), []).data.images
    settings = [*SETTINGS, f"data.labelled_images={images}", f"finetune.smoothing={smoothing}", *more]
    trained(tiny, run, *settings, f"finetune.init={encoder}", f"train.zero_stage={stage}", verb="finetune")
    losses, theirs = peer_training(load_config(str(tiny.config), settings), encoder, tmp_path / "peer")
    assert [line["loss"] for line in read_metrics(run, "train")] == pytest.approx(losses, rel=1e-5)
    ours = weights(run)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    if more:
        decays = [line["weight_decay"] for line in read_metrics(run, "train")]
        assert decays == sorted(decays) and decays[0] == pytest.approx(0.05) and 0.85 < decays[-1] < 0.9
        for to in ("hf", "timm"):  # checked by the command itself: the library's logits are ours
            assert export.run(run, tmp_path / to, to) == 0


@pytest.mark.parametrize("to", ["hf", "timm", "unilm"])
def test_a_finetuned_classifier_is_exported_with_its_head(tuned, tmp_path, to):
    """Checked by the command itself: the library's logits are ours."""
    assert export.run(tuned, tmp_path / "out", to) == 0
    if to == "unilm":
        found = torch.load(tmp_path / "out" / UNILM_FILE, weights_only=True)["model"]
    else:
        found = load_file(tmp_path / "out" / "model.safetensors")
    head = found["classifier.weight" if to == "hf" else "head.weight"]
    assert torch.equal(head, weights(tuned)["head.weight"])


@pytest.mark.parametrize("to", ["hf", "timm"])
def test_an_exported_classifier_brings_its_names_and_its_view(tuned, tiny, tmp_path, to):
    """What the classes are called, and the central view that the test was taken on; transformers' own preprocessing of
    an image is then what the test sees."""
    assert export.run(tuned, tmp_path / "out", to) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    loaded = load_config(str(tiny.config), [])
    names = image_set(loaded, loaded.data.images).manifest.classes
    if to == "timm":
        assert config["label_names"] == list(names) and config["pretrained_cfg"]["crop_pct"] == 0.875
        return
    assert list(config["id2label"].values()) == list(names) == list(config["label2id"])
    slope = np.linspace(0, 255, 160)[None, :, None] * np.linspace(0.5, 1, 120)[:, None, None]
    image = Image.fromarray(np.repeat(slope, 3, axis=2).astype(np.uint8))
    # by name: where timm was imported, transformers takes the stand-in for torchvision as a real one
    theirs = BeitImageProcessorPil.from_pretrained(tmp_path / "out")(image, return_tensors="pt")["pixel_values"][0]
    side, mean, std = 0.875 * 120, loaded.model.mean, loaded.model.std
    box = (80 - side / 2, 60 - side / 2, 80 + side / 2, 60 + side / 2)
    ours = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC, box=box)) / 255
    wanted = (torch.from_numpy(ours).permute(2, 0, 1).float() - torch.tensor(mean)[:, None, None]) / std[0]
    assert len(set(std)) == 1
    torch.testing.assert_close(theirs, wanted, rtol=0, atol=0.05)


def test_a_classifier_is_exported_whole_alone(tuned, tmp_path):
    with pytest.raises(ConfigError, match="holds a classifier, which is exported with its head: leave --finetune out"):
        export.run(tuned, tmp_path / "out", "hf", finetune=True)
