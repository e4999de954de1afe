"""The stream: the same batches for any ranks and workers, the same view for tokenizer and encoder, nothing lost."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.data.batches import training_batches
from beitforge.pipeline.data.pretraining import DataSource, pretraining, refuse_other_tokenizers
from beitforge.pipeline.model.pixels import jitter
from beitforge.pipeline.tokenizers.storage import load_tokenizer
from beitforge.shards.decode.jpeg import EXACT
from beitforge.shards.errors import ShardError
from beitforge.shards.format.manifest import read_image_manifest, read_token_manifest
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.loader import Batch, Stream, load
from beitforge.shards.stream.order import RankBatches
from beitforge.shards.stream.view_sources import RecordedViews

GLOBAL = 12


def tiny_config(tiny, *overrides: str) -> Config:
    return load_config(str(tiny.config), list(overrides))


def stream_rows(config: Config, source: DataSource, first: int, steps: int, ranks: int, workers: int) -> list[tuple]:
    """(sample, pixels, tokens, mask) of every sample of `steps` steps, as `ranks` ranks read them, in sample order."""
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, workers=workers))
    rows = []
    for rank in range(ranks):
        batches = training_batches(
            config,
            source,
            first_sample=first,
            global_batch=GLOBAL,
            micro=GLOBAL // ranks // (2 if ranks == 2 else 1),
            rank=rank,
            world=ranks,
            steps=steps,
        )
        rows += [row for batch in batches for row in split(batch)]
    return sorted(rows, key=lambda row: row[0])


def split(batch: Batch) -> list[tuple]:
    parts = (batch.pixels, batch.tokens, batch.draws["mask"], batch.jitters)
    return [
        (int(sample), *(bytes(part[i].numpy()) for part in parts)) for i, sample in enumerate(batch.samples.tolist())
    ]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores: meant here
@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 1), (4, 3)])
def test_same_sequence_for_any_ranks_and_workers(tiny, ranks, workers):
    """Promise 3: one epoch and a bit, read by other shapes, is byte for byte the same."""
    config = tiny_config(tiny)
    source = pretraining(config)
    steps = 5  # 60 samples of an epoch of 50: crosses its end
    alone = stream_rows(config, source, 0, steps, ranks=1, workers=0)
    assert stream_rows(config, source, 0, steps, ranks, workers) == alone


@pytest.mark.parametrize("decoder", EXACT)
def test_same_batches_by_any_decoder(tiny, decoder):
    config = tiny_config(tiny, f"loader.decoder={decoder}")
    samples = np.arange(20, dtype=np.int64)
    expected = pretraining(tiny_config(tiny, "loader.decoder=pillow")).stream.batch(samples)
    assert split(pretraining(config).stream.batch(samples)) == split(expected)


def test_each_sample_once_an_epoch(tiny):
    """Promise 4: the keys of one epoch are the keys of the set."""
    source = pretraining(tiny_config(tiny))
    epochs, shards, rows = source.stream.places.locate(np.arange(2 * source.samples))
    for epoch in (0, 1):
        here = epochs == epoch
        assert len(set(zip(shards[here].tolist(), rows[here].tolist(), strict=True))) == source.samples == here.sum()


@pytest.mark.parametrize("stopped_after", [1, 2, 4])
def test_goes_on_with_another_shape(tiny, stopped_after):
    """Promise 2 and 3: stop one shape at any step, go on with another from samples_seen alone."""
    config = tiny_config(tiny)
    source = pretraining(config)
    whole = stream_rows(config, source, 0, 5, ranks=1, workers=0)
    before = stream_rows(config, source, 0, stopped_after, ranks=2, workers=1)
    after = stream_rows(config, source, stopped_after * GLOBAL, 5 - stopped_after, ranks=4, workers=0)
    assert before + after == whole


def test_tokens_are_those_of_the_pixels(tiny):
    """Promise 1: what the trainer cuts by the record, tokenized again, gives the stored tokens."""
    config = tiny_config(tiny)
    source = pretraining(config)
    dvae, identity = load_tokenizer(Path(config.data.tokenizer))
    again = dataclasses.replace(source.stream, size=tuple(identity["input_size"]), resample=identity["filter"])
    batch = again.batch(np.arange(source.samples, dtype=np.int64))
    pixels = jitter(batch.pixels, batch.jitters, batch.orders, batch.pivots)
    agreement = (dvae.tokenize(pixels) == batch.tokens).float().mean()
    # convolutions of another batch size may round another way; an argmax that close to a tie may differ
    assert agreement > 0.999
    assert len(batch.tokens.unique()) > 1


def test_views_change_with_the_epoch(tiny):
    """View (epoch + hash) mod K: the same sample shows another view next epoch, and all K within K epochs."""
    source = pretraining(tiny_config(tiny))
    stream = source.stream
    seen: dict[tuple[int, int], set[bytes]] = {}
    for epoch in range(3):
        numbers = np.arange(epoch * source.samples, (epoch + 1) * source.samples)
        _, shards, rows = stream.places.locate(numbers)
        batch = stream.batch(numbers)
        for place, jitters in zip(zip(shards.tolist(), rows.tolist(), strict=True), batch.jitters, strict=True):
            seen.setdefault(place, set()).add(bytes(jitters.numpy()))
    assert {len(views) for views in seen.values()} == {3}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its tars open
def test_webdataset_reads_our_image_shards(tiny):
    """Plain WebDataset tars: the library's own reader, in its default form, sees every sample."""
    folder = tiny.folder / "shards" / "train"
    urls = [str(folder / f"{shard.name}.tar") for shard in read_image_manifest(folder).shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg", "cls", "__key__"))
    assert len(samples) == 50
    assert {label for _, label, _ in samples} == {0, 1, 2, 3, 4}
    assert all(image.mode == "RGB" and key.startswith(f"class{label}/") for image, label, key in samples)


def test_safetensors_reads_our_token_shards(tiny):
    """Token shards are plain safetensors."""
    from safetensors.numpy import load_file

    folder = tiny.folder / "tokens" / "train"
    entry = read_token_manifest(folder).shards[0]
    tensors = load_file(folder / f"{entry.name}.safetensors")
    assert tensors["tokens"].shape == (3, entry.samples, 16)
    assert tensors["tokens"].dtype == np.uint16


def copied(tiny, tmp_path: Path) -> Path:
    shutil.copytree(tiny.folder / "shards", tmp_path / "shards")
    shutil.copytree(tiny.folder / "tokens", tmp_path / "tokens")
    return tmp_path


def moved(folder: Path) -> list[str]:
    return [f"data.images={folder}/shards/train", f"data.tokens={folder}/tokens/train"]


def damage(folder: Path, shard: int, row: int) -> str:
    """Flip one byte inside an image; returns its key."""
    images = ImageSet(folder / "shards" / "train")
    index = images.index(shard)
    with open(folder / "shards" / "train" / f"{images.manifest.shards[shard].name}.tar", "r+b") as file:
        file.seek(int(index.image_offset[row]) + int(index.image_size[row]) // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    return index.key(row)


def test_one_flipped_bit_is_substituted_and_named(tiny, tmp_path):
    """Promise 4: no decoder notices a flipped bit; the index does, and the substitute depends on the sample alone."""
    folder = copied(tiny, tmp_path)
    key = damage(folder, shard=1, row=3)
    source = pretraining(tiny_config(tiny, *moved(folder)))
    whole = source.stream.batch(np.arange(source.samples))
    assert [bad.key for bad in whole.bad] == [key]
    assert "checksum" in whole.bad[0].reason
    alone = source.stream.batch(np.array([whole.bad[0].sample]))
    assert alone.bad == whole.bad
    at = whole.samples.tolist().index(whole.bad[0].sample)
    assert torch.equal(alone.pixels[0], whole.pixels[at])
    assert torch.equal(alone.tokens[0], whole.tokens[at])


def test_a_shard_without_a_usable_image_stops(tiny, tmp_path):
    folder = copied(tiny, tmp_path)
    entry = ImageSet(folder / "shards" / "train").manifest.shards[1]
    for row in range(entry.samples):
        damage(folder, 1, row)
    source = pretraining(tiny_config(tiny, *moved(folder)))
    with pytest.raises(ShardError, match="none usable"):
        source.stream.batch(np.arange(source.samples))


def edit_manifest(folder: Path, change) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    del content["digest"]  # as an earlier version wrote it; else it would vouch for the old words
    path.write_text(json.dumps(content))


PAIRINGS = {
    "digest": (lambda c: c["shards"][0].update(image_digest="0" * 32), "made from other images"),
    "count": (lambda c: c["shards"][1].update(samples=3), "has 3 samples, its image shard 16"),
    "names": (lambda c: c["shards"].pop(), "does not list the image set's shards"),
    "vocabulary": (lambda c: c["tokenizer"].update(vocabulary=99), "vocabulary of 99"),
    "tokenizer": (lambda c: c["tokenizer"].update(fingerprint="f" * 64), "made by another tokenizer"),
    "grid": (lambda c: c["tokenizer"].update(grid=[5, 5]), "token grid of"),
    "policy": (lambda c: c["policy"].update(flip=0.25), "view.flip 0.25"),
    "views": (lambda c: c.update(num_views=7), "7 views"),
    "arithmetic": (lambda c: c["policy"].update(arithmetic=1), "view.arithmetic 1, here it is 3"),
    "precision": (lambda c: c["tokenizer"].update(precision="bf16"), "tokenizer.precision bf16, here it is fp32"),
    "schema": (lambda c: c.update(schema=9), "schema 1"),
    "kind": (lambda c: c.update(kind="images"), "not tokens"),
}


@pytest.mark.parametrize("name", PAIRINGS)
def test_a_wrong_pair_is_refused_before_training(tiny, tmp_path, name):
    """The reader refuses a pair that does not belong together, and says which."""
    folder = copied(tiny, tmp_path)
    change, words = PAIRINGS[name]
    edit_manifest(folder / "tokens" / "train", change)
    config = tiny_config(tiny, *moved(folder))
    with pytest.raises(ValueError, match=words) as caught:
        pretraining(config)
        refuse_other_tokenizers(config)
    assert "\n" not in str(caught.value)


def test_token_rows_of_another_order_are_refused(tiny, tmp_path):
    """Counts and digests agree, the rows do not: the keys tell."""
    from safetensors.numpy import load_file, save_file

    folder = copied(tiny, tmp_path)
    path = sorted((folder / "tokens" / "train").glob("*.safetensors"))[0]
    tensors = load_file(path)
    tensors["keys"] = tensors["keys"][::-1].copy()
    save_file(tensors, path)
    source = pretraining(tiny_config(tiny, *moved(folder)))
    with pytest.raises(ShardError, match="row 0"):
        source.stream.batch(np.arange(source.samples))


@pytest.mark.parametrize("what", ["tar", "index", "tokens"])
def test_a_missing_or_cut_file_is_named(tiny, tmp_path, what):
    folder = copied(tiny, tmp_path)
    shards = folder / "shards" / "train"
    name = read_image_manifest(shards).shards[0].name
    path = {
        "tar": shards / f"{name}.tar",
        "index": shards / f"{name}.index.safetensors",
        "tokens": folder / "tokens" / "train" / f"{name}.safetensors",
    }[what]
    path.write_bytes(path.read_bytes()[:-600])
    source = pretraining(tiny_config(tiny, *moved(folder)))
    with pytest.raises(ShardError, match=path.name):
        source.stream.batch(np.arange(source.samples))


def test_an_unfinished_set_is_refused(tiny, tmp_path):
    folder = copied(tiny, tmp_path)
    (folder / "tokens" / "train" / "manifest.json").unlink()
    with pytest.raises(ShardError, match="unfinished"):
        pretraining(tiny_config(tiny, *moved(folder)))


def test_worker_errors_name_the_file(tiny, tmp_path):
    """A worker's failure reaches the training process with its message, not as a bare traceback of a process."""
    folder = copied(tiny, tmp_path)
    images = ImageSet(folder / "shards" / "train")
    name = images.manifest.shards[0].name
    (folder / "shards" / "train" / f"{name}.tar").unlink()
    source = pretraining(tiny_config(tiny, *moved(folder)))
    numbers = RankBatches(0, 50, 50, 0, 1, 1)
    with pytest.raises(ShardError, match=f"^host .* cannot read {name}[^\n]*$"):
        next(load(source.stream, numbers, workers=1, prefetch=1, pin=False))


def test_streams_travel_to_workers_without_open_files(tiny):
    """A stream can be pickled (spawned workers) and gives the same batch there."""
    import pickle

    stream: Stream = pretraining(tiny_config(tiny)).stream
    here = stream.batch(np.arange(6))
    there = pickle.loads(pickle.dumps(stream)).batch(np.arange(6))
    assert split(here) == split(there)
    assert isinstance(stream.source, RecordedViews)
