"""The own tokenizer: made from its seed alone, saved and loaded whole, refused when it is not what it says."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Config, Tokenizer
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.pixels import from_tokenizer, tokenizer_input
from beitforge.pipeline.tokenizers.dvae import Dvae, save_dvae
from beitforge.pipeline.tokenizers.storage import _fingerprint, load_tokenizer

SETTINGS = Tokenizer(input_size=Size(32, 32), vocabulary=20, width=8, embedding=6, residual_blocks=1)


pytestmark = pytest.mark.usefixtures("one_thread")


def pixels(count: int = 3, height: int = 32, width: int = 32) -> torch.Tensor:
    """In [0, 1]."""
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def message(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_shapes():
    """One token per 8 × 8 field, in row order; grids need not be square."""
    dvae = Dvae(SETTINGS, seed=0)
    assert dvae.logits(pixels()).shape == (3, 20, 4, 4)
    tokens = dvae.tokenize(pixels(2, 32, 64))
    assert tokens.shape == (2, 32)
    assert tokens.dtype == torch.int64
    assert 0 <= tokens.min() <= tokens.max() < 20
    assert dvae.decode(tokens, (4, 8)).shape == (2, 3, 32, 64)
    rebuilt, logits = dvae(tokenizer_input(pixels()), 1.0, torch.zeros(3, 20, 4, 4))
    assert rebuilt.shape == (3, 3, 32, 32)
    assert torch.equal(logits, dvae.logits(pixels()))


@pytest.mark.parametrize(("row", "column"), [(7, 0), (0, 7), (3, 5)])
def test_a_token_lies_where_its_field_is(row, column):
    """Token i belongs to row i div w, column i mod w: changing its field changes the tokens around it, and no other."""
    dvae = Dvae(dataclasses.replace(SETTINGS, vocabulary=4096), seed=0)
    image = pixels(1, 64, 64)
    changed = image.clone()
    field = (..., slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
    changed[field] = 1 - changed[field]
    moved = (dvae.logits(image) != dvae.logits(changed))[0].any(dim=0)
    reach = 1 + SETTINGS.residual_blocks  # in fields: one for the strided convolutions, one for each block's 3 × 3
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1] = True
    assert torch.equal(moved, expected)


def test_tokens_are_the_argmax_and_decode_is_their_codebook():
    dvae = Dvae(SETTINGS, seed=0)
    tokens = dvae.tokenize(pixels())
    assert torch.equal(tokens, dvae.logits(pixels()).flatten(2).argmax(dim=1))
    certain = torch.nn.functional.one_hot(tokens, 20).float().permute(0, 2, 1).view(3, 20, 4, 4)
    torch.testing.assert_close(dvae.decode(tokens, (4, 4)), from_tokenizer(dvae.decode_soft(certain)))


def test_a_cold_sample_is_the_argmax_of_the_noisy_logits():
    """Gumbel-softmax: softmax((logits + noise) / temperature); at temperature → 0 a single code."""
    dvae = Dvae(SETTINGS, seed=0)
    noise = torch.randn(3, 20, 4, 4, generator=torch.Generator().manual_seed(2))
    chosen = (dvae.logits(pixels()) + noise).flatten(2).argmax(dim=1)
    cold, logits = dvae(tokenizer_input(pixels()), 1e-4, noise)
    torch.testing.assert_close(from_tokenizer(cold), dvae.decode(chosen, (4, 4)))
    warm, _ = dvae(tokenizer_input(pixels()), 2.0, noise)
    torch.testing.assert_close(warm, dvae.decode_soft(((logits + noise) / 2).softmax(dim=1)))


def test_the_weights_come_from_the_seed_alone():
    """And torch's own generator is left as it was."""
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one = Dvae(SETTINGS, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    again, other = Dvae(SETTINGS, seed=1), Dvae(SETTINGS, seed=2)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert not torch.equal(tensor, other.state_dict()[name])


def test_round_trip(tmp_path):
    """The same weights, the same tokens, and what token manifests say of it."""
    dvae = Dvae(SETTINGS, seed=4)
    fingerprint = save_dvae(tmp_path / "new" / "folder", dvae, SETTINGS)
    loaded, identity = load_tokenizer(tmp_path / "new" / "folder")
    assert identity == {
        "kind": "dvae",
        "fingerprint": fingerprint,
        "vocabulary": 20,
        "grid": [4, 4],
        "input_size": [32, 32],
        "filter": "lanczos",
    }
    assert not loaded.training
    for name, tensor in dvae.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert torch.equal(loaded.tokenize(pixels()), dvae.tokenize(pixels()))
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "tokenizer.json",
        "tokenizer.safetensors",
    ]


def test_the_fingerprint_is_of_weights_and_shape(tmp_path):
    """sha256, the same wherever and whenever it is saved; another weight or another shape is another tokenizer."""
    prints = [
        save_dvae(tmp_path / "a", Dvae(SETTINGS, seed=4), SETTINGS),
        save_dvae(tmp_path / "b", Dvae(SETTINGS, seed=4), dataclasses.replace(SETTINGS, lr=9.0)),
        save_dvae(tmp_path / "c", Dvae(SETTINGS, seed=5), SETTINGS),
        save_dvae(tmp_path / "d", Dvae(SETTINGS, seed=4), dataclasses.replace(SETTINGS, input_size=Size(40, 40))),
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    content = json.loads((tmp_path / "a" / "tokenizer.json").read_text())
    assert content.pop("fingerprint") == prints[0]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    digest.update((tmp_path / "a" / "tokenizer.safetensors").read_bytes())
    assert prints[0] == digest.hexdigest()
    assert content["shape"] == {"vocabulary": 20, "width": 8, "embedding": 6, "residual_blocks": 1}
    assert content["input_size"] == [32, 32]


def test_saved_weights_are_plain_safetensors(tmp_path):
    from safetensors.torch import load_file

    dvae = Dvae(SETTINGS, seed=4)
    save_dvae(tmp_path, dvae, SETTINGS)
    weights = load_file(tmp_path / "tokenizer.safetensors")
    assert weights.keys() == dvae.state_dict().keys()
    assert weights["codebook_VE"].shape == (20, 6)


@pytest.mark.parametrize("place", [0.1, 0.5, -1])
def test_a_changed_byte_is_refused(tmp_path, place):
    save_dvae(tmp_path, Dvae(SETTINGS, seed=4), SETTINGS)
    path = tmp_path / "tokenizer.safetensors"
    data = bytearray(path.read_bytes())
    data[int(place * len(data)) if place > 0 else -1] ^= 1
    path.write_bytes(data)
    assert "sha256 differs" in message(tmp_path)


def test_a_changed_shape_is_refused(tmp_path):
    """The config is part of the fingerprint."""
    save_dvae(tmp_path, Dvae(SETTINGS, seed=4), SETTINGS)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"vocabulary": 20', '"vocabulary": 21'))
    assert "sha256 differs" in message(tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "tokenizer.safetensors").unlink(), "tokenizer.safetensors is missing"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"kind": "dvae", '), "damaged"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "damaged"),
        (lambda folder: (folder / "tokenizer.safetensors").write_bytes(b""), "sha256 differs"),
    ],
)
def test_half_a_tokenizer_is_refused(tmp_path, damage, words):
    save_dvae(tmp_path, Dvae(SETTINGS, seed=4), SETTINGS)
    damage(tmp_path)
    assert words in message(tmp_path)


def test_no_tokenizer_at_all(tmp_path):
    assert "holds no finished tokenizer" in message(tmp_path / "nowhere")


def test_weights_alone_are_no_tokenizer(tmp_path, monkeypatch):
    """Killed between weights and config: the config comes last, so the folder is unfinished, not half valid."""
    written = Path.write_text

    def killed(path: Path, *rest, **named):
        if path.name.startswith("tokenizer.json"):
            raise KeyboardInterrupt
        return written(path, *rest, **named)

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        save_dvae(tmp_path, Dvae(SETTINGS, seed=4), SETTINGS)
    monkeypatch.undo()
    assert "tokenizer.json is missing" in message(tmp_path)


def test_the_default_grid_is_recipes():
    """112 pixels by 8: 14 × 14 tokens, one for each patch of 224 pixels by 16."""
    config = Config()
    assert config.tokenizer.grid == config.model.grid == (14, 14)
    assert config.tokenizer.vocabulary == 8192


def test_the_filter_is_part_of_a_tokenizer(tmp_path):
    """Another filter is another tokenizer; one that is not known here is refused, when it is saved and when it is
    read."""
    other = dataclasses.replace(SETTINGS, filter="torch lanczos")
    prints = {save_dvae(tmp_path / settings.filter, Dvae(settings, seed=4), settings) for settings in (SETTINGS, other)}
    assert len(prints) == 2
    assert load_tokenizer(tmp_path / "torch lanczos")[1]["filter"] == "torch lanczos"
    with pytest.raises(ConfigError, match="the filter is 'magic', expected one of lanczos, bicubic, torch"):
        save_dvae(tmp_path / "c", Dvae(SETTINGS, seed=4), dataclasses.replace(SETTINGS, filter="magic"))
    path = tmp_path / "torch lanczos" / "tokenizer.json"
    content = json.loads(path.read_text())
    del content["fingerprint"]
    content["filter"] = ["magic"]
    fingerprint = _fingerprint(path.with_suffix(".safetensors"), content)
    path.write_text(json.dumps({**content, "fingerprint": fingerprint}))
    assert "expected one of" in message(path.parent)


def test_a_torch_without_the_filter_is_named(tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, filter="torch lanczos")
    save_dvae(tmp_path, Dvae(settings, seed=4), settings)

    def older(*_: object, **options: object) -> None:
        raise NotImplementedError(f"Input Error: Only 4D input Tensors supported (got mode {options['mode']})")

    monkeypatch.setattr(torch.nn.functional, "interpolate", older)
    assert "install torch 2.13 or newer" in message(tmp_path)
