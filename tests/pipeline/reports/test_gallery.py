"""Images of reports: attention is the encoder's own, neighbours are what is near, errors are where they are."""

import dataclasses

import numpy as np
import pytest
import torch

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Model
from beitforge.pipeline.evaluation.attention_maps import (
    attention_maps,
    attention_of,
    busiest_and_plainest,
    iterate_blocks,
    probabilities,
)
from beitforge.pipeline.evaluation.neighbours import FeatureBank, agreement, by_features, by_pixels, spread
from beitforge.pipeline.evaluation.reconstructions import errors, heat, outlined
from beitforge.pipeline.model.beit import Beit, Classifier
from beitforge.pipeline.stages import report
from beitforge.pipeline.weights.from_run import encoder_of
from tests.pipeline.runs.made_runs import (
    config_of,
    images_of,
    make_sets,
    tuned_lines,
    words,
    write_checkpoint,
    write_classifier,
    write_run,
)

MODEL = Model(input_size=Size(24, 32), patch_size=8, layers=3, width=32, heads=4)


def encoder(positions: str) -> Beit:
    beit = Beit(dataclasses.replace(MODEL, positions=positions), 16, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in beit.named_parameters():
            if name.endswith(("bias", "table")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return beit.eval()


@pytest.mark.parametrize("positions", ["absolute", "relative", "relative_shared"])
@torch.no_grad()
def test_probabilities_times_values_are_the_blocks_own_attention(positions):
    beit = encoder(positions)
    pixels = torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(2))
    bias = beit.shared_bias() if beit.shared_bias is not None else None
    states = beit.hidden(pixels, None, every=True)
    for (block, x_BSD), state in zip(iterate_blocks(beit, pixels), states, strict=False):
        assert torch.equal(x_BSD, state), "the walk is the encoder's own"
        normed = block.norm1(x_BSD)
        probabilities_BASS, v_BASK = probabilities(block.attention, normed, bias)
        assert torch.allclose(probabilities_BASS.sum(dim=-1), torch.ones(2, 4, 13))
        own = block.attention(normed, bias, None, None)
        ours = block.attention.out((probabilities_BASS @ v_BASK).transpose(1, 2).flatten(2))
        assert (ours - own).abs().max() < 1e-5


def test_attention_of_chosen_blocks_is_a_mean_over_heads():
    beit = encoder("relative_shared")
    found = attention_of(beit, torch.zeros(1, 3, 24, 32), [0, 2])
    assert sorted(found) == [0, 2] and found[2].shape == (1, 13, 13)
    assert torch.allclose(found[0].sum(dim=-1), torch.ones(1, 13))


def test_looks_mark_the_busiest_and_the_plainest_patch():
    pixels = torch.full((1, 3, 24, 32), 0.5) + 0.01 * torch.rand(
        1, 3, 24, 32, generator=torch.Generator().manual_seed(0)
    )
    pixels[..., 8:16, 16:24] = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels[..., 16:24, 0:8] = 0.25
    assert busiest_and_plainest(pixels, 8).tolist() == [[4 + 2, 8 + 0]]
    (look,) = attention_maps(encoder("relative_shared"), pixels)
    for shown in (look.image, look.middle, look.last, *look.patches):
        assert shown.shape == (24, 32, 3) and shown.dtype == np.uint8
    mark = outlined(np.zeros((24, 32, 3), np.uint8), 6, 8, 4)
    assert np.array_equal(look.patches[0][8:16, 16:24][0], mark[8:16, 16:24][0]), "an edge in the mark's colour"


def test_heat_goes_from_dark_to_light():
    shades = heat(np.linspace(0, 1, 50)[None])[0].astype(int).sum(axis=1)
    assert (np.diff(shades) >= 0).all() and shades[0] < 60 and shades[-1] > 600


def test_errors_are_bright_where_images_differ_and_right_patches_are_outlined():
    one, other = torch.zeros(3, 16, 16), torch.zeros(3, 16, 16)
    other[:, 8:, 8:] = 1.0
    shown = errors(one, other, torch.tensor([True, False, False, False]), (2, 2)).astype(int)
    assert shown[8:, 8:].min() >= 190 and shown[8:, :8].max() < 30 and shown[2:6, 2:6].max() < 30
    assert (shown[0, :8] == [34, 197, 94]).all()


@pytest.mark.parametrize(("samples", "most"), [(1, 10), (2, 2), (97, 97), (1000, 64), (50_000, 1000)])
def test_images_are_spread_over_the_set_and_none_comes_twice(samples, most):
    numbers = spread(samples, most)
    assert len(set(numbers.tolist())) == len(numbers) == min(samples, most)
    assert numbers.min() >= 0 and numbers.max() < samples
    half = np.sort(numbers[: max(1, len(numbers) // 2)])
    assert len(half) < 16 or np.diff(half).max() < 5 * samples / len(half), "so is every beginning"


def gathered(features, raw, labels):
    return FeatureBank(
        numbers=np.arange(len(features)),
        features=features,
        raw=raw,
        images=[],
        labels=torch.tensor(labels),
        layer=1,
    )


def test_the_nearest_are_the_nearest_and_never_the_image_itself():
    """Two directions in feature space, two places in pixels, crossed."""
    draw = torch.Generator().manual_seed(0)
    direction = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])[[0, 0, 0, 1, 1, 1]] + 0.01 * torch.randn(6, 2, generator=draw)
    raw = torch.tensor([0.0, 9.0, 0.1, 9.1, 0.2, 9.2])[:, None]
    found = gathered(direction, raw, [0, 0, 0, 1, 1, 1])
    features, pixels = by_features(found, 2)[0], by_pixels(found, 2)[0]
    assert [sorted(row) for row in pixels.tolist()] == [[2, 4], [3, 5], [0, 4], [1, 5], [0, 2], [1, 3]]
    assert all(i not in row for i, row in enumerate(features.tolist()))
    assert agreement(pixels, found.labels) == pytest.approx(4 / 12)
    assert by_features(found, 50)[0].shape == (6, 5), "no more than there are"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    make_sets(folder)
    return folder, config_of(folder)


def test_a_fine_tuned_encoder_is_loaded_whatever_its_tables(made):
    folder, config = made
    write_run(folder / "tuned", config, tuned_lines(60))
    classifier = write_classifier(folder / "tuned", config, 60)
    loaded = encoder_of(config, folder / "tuned", "finetune")
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert isinstance(loaded, Classifier) and torch.equal(loaded(pixels), classifier.eval()(pixels))
    assert report.run([folder / "tuned"], data=True) == 0
    html = (folder / "tuned" / "report.html").read_text()
    assert images_of(html, "attention") == 4 * 5 and images_of(html, "neighbours") == 6 * 11
    assert images_of(html, "images") == 0 and "test set, at step 60" in words(html)


def test_weights_of_another_kind_are_a_line_not_a_traceback(made):
    folder, config = made
    write_run(folder / "wrong", config, tuned_lines(60))
    write_checkpoint(folder / "wrong", config, 60)
    assert report.run([folder / "wrong"], data=True) == 0
    said = words((folder / "wrong" / "report.html").read_text())
    assert "no classifier's of its config" in said and "Test accuracy" in said


def test_a_tokenizers_report_shows_its_images(made):
    folder, config = made
    lines = [{**line, "reconstruction_mse": 0.01} for line in tuned_lines(20) if line["kind"] != "test"]
    write_run(folder / "tokenizer" / "training", config, lines)
    shown = folder / "tokenizer" / "reconstructions.png"
    assert report.run([folder / "tokenizer" / "training"], data=True) == 0
    html = (folder / "tokenizer" / "training" / "report.html").read_text()
    assert images_of(html, "images") == 0 and not shown.exists()
    shown.write_bytes(b"\x89PNG")
    assert report.run([folder / "tokenizer" / "training"], data=True) == 0
    assert images_of((folder / "tokenizer" / "training" / "report.html").read_text(), "images") == 1
