"""`import beitforge` in a script: the examples of docs/python.md run, type-check, and give what the commands give."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import beitforge
from beitforge.pipeline.config.loading import load_config, to_dict
from beitforge.pipeline.data.batches import evaluation_batches, training_batches
from beitforge.pipeline.data.labelled import as_tested
from beitforge.pipeline.data.pretraining import evaluation, pretraining
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.model.pixels import normalise
from beitforge.pipeline.runs.checkpoints import State
from beitforge.pipeline.stages.finetune import new_classifier
from beitforge.pipeline.training.objectives import encoder_input
from beitforge.pipeline.weights.classifier import save_classifier
from beitforge.pipeline.weights.encoder import save_encoder
from tests.conftest import ROOT, TinySet

STATE = State(step=1, samples_seen=8, tokens=0, world=1, zero_stage=0, precision="fp32", images="", config="")
OWN_CLASS = "# my_tokenizer.py\n"


def examples() -> list[str]:
    """The Python code of docs/python.md, block by block."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def folder(tiny: TinySet, tmp_path: Path) -> Path:
    """What docs/python.md says that its examples find in the working folder."""
    (tmp_path / "data").mkdir()
    for name, made in (("images", "shards/train"), ("tokens", "tokens/train"), ("tokenizer", "tokenizer")):
        (tmp_path / "data" / name).symlink_to(tiny.folder / made)
    config = load_config(str(tiny.config), [])
    beit = Beit(config.model, config.tokenizer.vocabulary, seed=5)
    save_encoder(tmp_path / "encoder", beit.state_dict(), config, STATE)
    names = tuple(f"class {number}" for number in range(5))
    tuned = load_config(str(tiny.config), ["finetune.input_size=48", "finetune.test_crop=0.7"])
    (tmp_path / "classifier.yaml").write_text(yaml.safe_dump(to_dict(tuned)))
    save_classifier(tmp_path / "classifier", new_classifier(tuned, 5).state_dict(), tuned, names, STATE)
    (own,) = [block for block in examples() if block.startswith(OWN_CLASS)]
    (tmp_path / "my_tokenizer.py").write_text(own)
    (tmp_path / "script.py").write_text("\n".join(block for block in examples() if not block.startswith(OWN_CLASS)))
    return tmp_path


def test_the_documented_examples_run(folder):
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert re.fullmatch(r"50 \S+ [0-4] \(\d+, \d+, 3\)", first), first
    assert last == "torch.Size([1, 16])"


def test_a_users_script_type_checks(folder):
    """mypy passes the examples, knows what the functions return, and finds wrong uses."""
    revealed = "\n".join(f"reveal_type({name})" for name in ("images", "first", "encoder", "preprocess", "codes"))
    with open(folder / "script.py", "a") as script:
        script.write(f"\n{revealed}\nbeitforge.stream(images, size=32)\nbeitforge.no_such_name\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "script.py"]
    command += ["--cache-dir", str(ROOT / ".mypy_cache")]  # that of `./launch.sh check`: a cold one takes a minute
    environment = {**os.environ, "MYPYPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    types = re.findall(r'Revealed type is "(.*?)"', done.stdout)
    assert [name.rpartition(".")[2].rstrip("]") for name in types] == [
        "ImageSet",
        "Batch",
        "Encoder",
        "Preprocess",
        "Tensor",
    ], done.stdout
    errors = re.findall(r"error: .*\[(.*)\]", done.stdout)
    assert errors == ["call-arg", "attr-defined"], done.stdout


def test_import_is_instant_and_names_are_real():
    code = (
        "import sys, beitforge; assert not {'torch', 'numpy', 'PIL'} & set(sys.modules); "
        "assert set(beitforge.__all__) <= set(dir(beitforge)); "
        "beitforge.open_images; assert 'torch' not in sys.modules; "
        "[getattr(beitforge, name) for name in beitforge.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        beitforge.no_such_name  # noqa: B018


def test_without_torch_a_name_that_needs_it_says_so():
    code = "import sys, beitforge; sys.modules['torch'] = None; beitforge.open_images; beitforge.load_encoder"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].endswith(
        "beitforge.load_encoder needs torch: pip install 'beitforge[train]'"
    ), done.stderr


def test_samples_are_those_of_the_set(tiny):
    images = beitforge.open_images(str(tiny.folder / "shards" / "train"))
    samples = list(images)
    assert len(samples) == len(images) == 50 and len({sample.key for sample in samples}) == 50
    assert samples[17] == images[17] and images[-1] == samples[-1]
    assert images[17].data == images.read(1, 1) and images[17].key == images.index(1).key(1)  # 16 in a shard
    assert [sample.label for sample in samples] == [int(i) for n in range(4) for i in images.index(n).columns["label"]]
    assert images[3].pixels().dtype == np.uint8 and images[3].pixels().shape[2] == 3
    with pytest.raises(IndexError):
        images[50]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_stream_is_pretrainings(tiny, rank):
    """The same samples, pixels and tokens as `pretrain` reads with the same order, from any sample on."""
    config = load_config(str(tiny.config), [])
    step = {"global_batch": 8, "micro": 4, "rank": rank, "world": 2, "steps": 9}
    wanted = list(training_batches(config, pretraining(config), first_sample=16, **step))
    images = beitforge.open_images(tiny.folder / "shards" / "train")
    tokens = beitforge.open_tokens(tiny.folder / "tokens" / "train", images)
    order = beitforge.OrderPolicy(seed=config.data.seed, chunk=4, window=2, lanes=4)
    given = {"size": 32, "batch_size": 4, "rank": rank, "world": 2, "first_sample": 16, "order": order}
    found = list(beitforge.stream(images, tokens, **given, batches=9))
    assert len(found) == len(wanted) == 9
    for ours, theirs in zip(found, wanted, strict=True):
        for name in ("samples", "pixels", "tokens", "jitters", "labels"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    fresh = next(beitforge.stream(images, **given, workers=1))
    assert fresh.samples.equal(wanted[0].samples) and not fresh.tokens.numel()


def test_without_shuffle_each_image_comes_once(tiny):
    config = load_config(str(tiny.config), [])
    where = tiny.folder / "shards" / "train"
    wanted = list(evaluation_batches(config, evaluation(config, str(where)), samples=50, micro=8, rank=1, world=2))
    images = beitforge.open_images(where)
    found = list(beitforge.stream(images, size=32, batch_size=8, shuffle=False, rank=1, world=2))
    assert [len(batch.samples) for batch in found] == [8, 8, 8, 1]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rank": 2, "world": 2}, "rank is 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"views": beitforge.ViewPolicy(), "tokens": True}, "not both"),
    ],
)
def test_impossible_streams_are_refused(tiny, given, said):
    images = beitforge.open_images(tiny.folder / "shards" / "train")
    if given.get("tokens"):
        given = {**given, "tokens": beitforge.open_tokens(tiny.folder / "tokens" / "train", images)}
    with pytest.raises(ValueError, match=said):
        next(beitforge.stream(images, **{"size": 32, "batch_size": 4, **given}))


def test_preprocessing_is_that_of_evaluation(folder):
    """PIL images, arrays and the stream's own pixels become the same batch."""
    encoder, preprocess = beitforge.load_encoder(folder / "encoder")
    images = beitforge.open_images(folder / "data" / "images")
    batch = next(beitforge.stream(images, size=preprocess.size, batch_size=4, shuffle=False))
    wanted = normalise(batch.pixels.float() / 255, encoder.model.mean, encoder.model.std)
    arrays = [images[n].pixels() for n in range(4)]
    assert torch.equal(preprocess(batch.pixels), wanted)
    assert torch.equal(preprocess(batch.pixels.float() / 255), wanted)
    assert torch.equal(preprocess(arrays), wanted)
    assert torch.equal(preprocess([Image.fromarray(array) for array in arrays]), wanted)
    assert torch.equal(preprocess([array / 255 for array in arrays]), wanted)
    assert torch.equal(preprocess(arrays[0]), wanted[:1])
    assert torch.equal(preprocess(np.stack([arrays[0]] * 2)), wanted[[0, 0]])


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((8, 8), np.uint8), "shape .8, 8."),
        (np.full((8, 8, 3), 7.0), r"lie in \[0, 1\]"),
        (np.zeros((8, 8, 3), np.int64), "int64"),
        (torch.zeros(1, 3, 8, 8), r"\[B, 3, 32, 32\]"),
        (["photo.jpg"], "not str"),
        ([], "no image"),
    ],
)
def test_what_is_no_image_is_refused(folder, images, said):
    _, preprocess = beitforge.load_encoder(str(folder / "encoder"))
    with pytest.raises(ValueError, match=said):
        preprocess(images)


@torch.no_grad()
def test_features_are_the_encoders_states(folder):
    encoder, preprocess = beitforge.load_encoder(folder / "encoder")
    pixels = preprocess(np.random.default_rng(0).integers(0, 255, (3, 40, 50, 3), np.uint8))
    states = encoder.hidden(pixels, None, every=True)
    for layer, depth in ((None, 1), (0, 0), (2, 2)):
        found = beitforge.features(encoder, pixels, layer=layer)
        assert torch.equal(found.patches, states[depth][:, 1:])
        assert torch.equal(found.pooled, states[depth][:, 1:].mean(dim=1))
    with pytest.raises(ValueError, match="layers 0 to 2"):
        beitforge.features(encoder, pixels, layer=3)


@torch.no_grad()
def test_a_classifier_sees_what_fine_tunings_test_sees(folder):
    """At its own size and crop, with the names of its classes; as an encoder, too."""
    config = load_config(str(folder / "classifier.yaml"), [])
    source = as_tested(config, str(folder / "data" / "images"), "the set", "a test")
    batch = next(evaluation_batches(config, source, samples=4, micro=4, rank=0, world=1))
    images = beitforge.open_images(folder / "data" / "images")
    classifier = beitforge.load_classifier(str(folder / "classifier"))
    arrays = [images[n].pixels() for n in range(4)]
    assert torch.equal(classifier.preprocess(arrays), encoder_input(config, batch))
    assert torch.equal(classifier(arrays), classifier.module(encoder_input(config, batch)))
    assert classifier.names == tuple(f"class {number}" for number in range(5))
    module, preprocess = beitforge.load_encoder(folder / "classifier")
    assert preprocess == classifier.preprocess and preprocess.share == 0.7
    assert beitforge.features(module, preprocess(arrays)).pooled.shape == (4, 32)
    with pytest.raises(beitforge.ConfigError, match="holds an encoder of a pretraining, which has no classes"):
        beitforge.load_classifier(folder / "encoder")


def test_an_encoder_of_nothing_is_refused(tmp_path):
    with pytest.raises(beitforge.ConfigError, match="neither a run folder"):
        beitforge.load_encoder(tmp_path)


def test_tokens_of_a_stored_tokenizer(tiny):
    tokenizer = beitforge.load_tokenizer(str(tiny.folder / "tokenizer"))
    assert (tokenizer.vocabulary, tokenizer.grid) == (64, (4, 4))
    pixels = torch.rand(2, 3, 32, 32)
    found = tokenizer(pixels)
    assert torch.equal(found, tokenizer.module.tokenize(pixels)) and found.shape == (2, 16)
    assert torch.equal(tokenizer([np.zeros((50, 60, 3), np.uint8)]), tokenizer(torch.zeros(1, 3, 32, 32)))
    assert tokenizer.decode(found).shape == (2, 3, 32, 32)


def test_a_kind_of_ones_own_tokenizes_a_set(folder, tiny, monkeypatch):
    """Saved by a script, used by the command, whose tokens the token set then holds."""
    monkeypatch.syspath_prepend(folder)
    from my_tokenizer import GreyLevels  # type: ignore[import-not-found]

    beitforge.save_tokenizer(folder / "grey", GreyLevels(64), shape={"vocabulary": 64}, size=32)
    config = load_config(str(tiny.config), [])
    assert config.view.num_views == 3
    words = ["tokenize", str(tiny.config), f"data.tokenizer={folder / 'grey'}", f"data.tokens={folder / 'made'}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(folder)])}
    environment["BEITFORGE_TOKENIZER_CLASSES"] = "other:Class, my_tokenizer:GreyLevels"
    command = [sys.executable, "-m", "beitforge", *words, "data.heldout_images=", "data.heldout_tokens="]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    images = beitforge.open_images(tiny.folder / "shards" / "train")
    tokens = beitforge.open_tokens(folder / "made", images)
    assert tokens.tokens.manifest.tokenizer["kind"] == "my_tokenizer:GreyLevels"
    batch = next(beitforge.stream(images, tokens, size=32, batch_size=50))
    assert batch.tokens.shape == (50, 16) and len(batch.tokens.unique()) > 10

    sys.path.remove(str(folder))
    sys.modules.pop("my_tokenizer")
    monkeypatch.setenv("BEITFORGE_TOKENIZER_CLASSES", "my_tokenizer:GreyLevels")
    with pytest.raises(beitforge.ConfigError, match=r"no module named 'my_tokenizer'.*PYTHONPATH"):
        beitforge.load_tokenizer(folder / "grey")


@pytest.mark.parametrize("named", ["", "planted:Other", "planted"])
def test_a_tokenizer_folder_imports_nothing_that_the_user_has_not_named(tmp_path, monkeypatch, named):
    from beitforge.pipeline.tokenizers.storage import build

    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("BEITFORGE_TOKENIZER_CLASSES", named)
    with pytest.raises(beitforge.ConfigError, match="BEITFORGE_TOKENIZER_CLASSES=planted:Class"):
        build("planted:Class", {"vocabulary": 64})
    assert not (tmp_path / "ran").exists()


def test_kinds_that_could_not_be_loaded_are_refused(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    from my_tokenizer import GreyLevels  # type: ignore[import-not-found]

    def save(module: torch.nn.Module, shape: dict) -> None:
        beitforge.save_tokenizer(folder / "refused", module, shape=shape, size=32)

    with pytest.raises(beitforge.ConfigError, match="lacks tokenize, decode"):
        save(torch.nn.Identity(), {"vocabulary": 64})
    with pytest.raises(beitforge.ConfigError, match="must hold vocabulary"):
        save(GreyLevels(64), {})
    with pytest.raises(beitforge.ConfigError, match="other weights"):
        save(GreyLevels(64), {"vocabulary": 32})
    with pytest.raises(beitforge.ConfigError, match="top of a module file"):
        save(type("Local", (GreyLevels,), {"__qualname__": "f.<locals>.Local"})(64), {"vocabulary": 64})
    assert not (folder / "refused").exists()
    sys.modules.pop("my_tokenizer")


@pytest.mark.parametrize("kind", ["subprocess:call", "torch.nn:Identity", "os:sep"])
def test_a_tokenizer_folder_calls_nothing_but_a_tokenizers_class(tmp_path, kind):
    from beitforge.pipeline.tokenizers.storage import build

    with pytest.raises(beitforge.ConfigError, match="with a method `tokenize`"):
        build(kind, {"args": ["touch", str(tmp_path / "called")]})
    assert not list(tmp_path.iterdir())
