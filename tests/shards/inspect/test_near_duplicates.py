"""The same image in another size or compression is found, other images are not, and no pair is missed."""

import itertools

import numpy as np
import pytest
from PIL import Image

from beitforge.pipeline.cli import main
from beitforge.shards.decode import codec
from beitforge.shards.inspect.near_duplicates import MOST_BITS, near_groups, near_pairs, perceptual_hash
from beitforge.shards.inspect.stats import duplicate_stats, table
from beitforge.shards.pack.pack import pack
from beitforge.shards.pack.plan import PackOptions
from tests.shards.made_images import encoded, write_folder


def scene(seed: int, width: int = 320, height: int = 240) -> Image.Image:
    """Rectangles and ellipses at random: large shapes, as photographs have."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.full((height, width, 3), rng.integers(0, 256, 3), np.float64)
    for _ in range(14):
        y, x, h, w = rng.uniform(0, 1, 4) * [height, width, height / 2, width / 2]
        inside = (np.abs(rows - y) < h) & (np.abs(columns - x) < w)
        pixels[inside] = 0.4 * pixels[inside] + 0.6 * rng.integers(0, 256, 3)
    return Image.fromarray((pixels + rng.normal(0, 3, pixels.shape)).clip(0, 255).astype(np.uint8))


def bits(one: int, other: int) -> int:
    return (one ^ other).bit_count()


@pytest.mark.parametrize("change", ["half", "a quarter", "larger", "poor", "webp", "brighter"])
def test_the_hash_survives_what_makes_a_near_duplicate(change):
    near = 0
    for seed in range(12):
        image = scene(seed)
        sizes = {"half": (160, 120), "a quarter": (80, 60), "larger": (500, 375)}
        other = image.resize(sizes.get(change, image.size), Image.Resampling.BICUBIC)
        if change == "brighter":
            other = Image.eval(other, lambda value: min(255, int(value * 1.05)))
        format, quality = ("WEBP", 60) if change == "webp" else ("JPEG", 30 if change == "poor" else 85)
        data = encoded(other, format, quality=quality)
        near += bits(perceptual_hash(np.asarray(image)), perceptual_hash(codec.decode(data))) <= MOST_BITS
    assert near >= 11


def test_other_images_are_far():
    hashes = [perceptual_hash(np.asarray(scene(seed))) for seed in range(30)]
    assert all(bits(a, b) > MOST_BITS for a, b in itertools.combinations(hashes, 2))


def test_flat_images_have_one_hash_however_they_round():
    flat = {
        perceptual_hash(np.full((height, 50, 3), value, np.uint8)) for height in (1, 33, 64) for value in (1, 77, 254)
    }
    assert len(flat) == 1


@pytest.mark.parametrize("seed", range(4))
def test_pairs_against_all_pairs(seed):
    """Every pair within MOST_BITS, wherever the bits lie, and no other: the tables leave none out."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, 150, dtype=np.uint64)
    for i in range(60):  # near ones, at 0 to 7 bits
        flips = rng.choice(64, i % 8, replace=False)
        hashes[149 - i] = hashes[i] ^ np.bitwise_or.reduce(
            np.append(np.uint64(1) << flips.astype(np.uint64), np.uint64(0))
        )
    hashes[60] = hashes[0]
    expected = [
        (i, j) for i, j in itertools.combinations(range(150), 2) if bits(int(hashes[i]), int(hashes[j])) <= MOST_BITS
    ]
    assert len(expected) >= 30
    assert sorted(map(tuple, near_pairs(hashes).tolist())) == expected


def test_many_equal_hashes_take_no_square_of_time():
    """A set of black frames is one group, and 200,000 pairs would not be a hundredth of its pairs."""
    num = 200_000
    hashes = np.zeros(num, np.uint64)
    hashes[7] = 2**64 - 1
    (group,) = near_groups(hashes, np.ones(num), np.zeros(num))
    assert len(group) == num - 1 and 7 not in group


def test_equal_hashes_of_other_shapes_or_greys_are_no_group():
    """Of flat and simple images the hash says little."""
    hashes = np.array([5, 5, 5, 4, 5], np.uint64)
    groups = near_groups(hashes, np.array([1, 1, 2, 1.03, 2.0]), np.array([10.0, 250.0, 10.0, 15.0, 90.0]))
    assert groups == [[0, 3]]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two sets of one packing and another one beside, with the same scenes in other sizes within and between."""
    folder = tmp_path_factory.mktemp("sets")
    files = {f"{i}.png": encoded(scene(i), "PNG") for i in range(12)}
    files |= {f"small-{i}.jpg": encoded(scene(i).resize((160, 120)), "JPEG", quality=85) for i in range(6)}
    write_folder(folder / "in", files)
    options = PackOptions(samples_per_shard=5, splits=(("heldout", 0.3),))
    packed = pack(folder / "in", folder / "out", options, "1%", 1)
    write_folder(folder / "in2", {"x.webp": encoded(scene(11).resize((200, 150)), "WEBP"), "y.png": files["10.png"]})
    pack(folder / "in2", folder / "other", PackOptions(), "1%", 1)
    keys = {name: [packed.plan.files.key(i) for i in order] for name, order in packed.plan.orders.items()}
    return folder, keys


@pytest.mark.parametrize("workers", [1, 2])
def test_groups_within_and_between_sets(sets, workers):
    folder, keys = sets
    found = duplicate_stats(folder / "out/heldout", [folder / "other"], workers)
    held = set(keys["heldout"])
    pairs = [{f"{i}", f"small-{i}"} for i in range(6)]
    expected = [pair for pair in pairs if pair & held] + [
        {key, name} for key, name in (("11", "x"), ("10", "y")) if key in held
    ]
    groups = [{key.rpartition(": ")[2] for key in group} for group in found["near duplicate groups"]]
    assert sorted(map(sorted, groups)) == sorted(map(sorted, expected)) != []
    assert found["near duplicates"]["groups"] == len(expected)
    assert found["near duplicates"]["also in train"] == sum(
        len(pair & held) for pair in pairs if pair & held and pair - held
    )
    assert "near duplicates" in table(found)


def test_equal_images_in_stats_and_verify(sets, tmp_path, capsys):
    """By checksum, without reading an image: within a set, in the others of its packing, and in any that is named."""
    folder, keys = sets
    name = "heldout" if "10" in keys["heldout"] else "train"
    assert main(["stats", str(folder / "out" / name), "--against", str(folder / "other")]) == 0
    out = capsys.readouterr().out
    assert f"also in {folder / 'other'} 1" in out and "near duplicates" not in out
    assert main(["verify", str(folder / "other"), "--workers", "1", "--against", str(folder / "out" / name)]) == 0
    out = capsys.readouterr().out
    assert f"equal images: 1 of 2 images of {folder / 'other'} are byte for byte in {folder / 'out' / name}, too" in out
    assert out.splitlines()[-1].endswith("clean")
    write_folder(tmp_path / "in", {"a/1.png": encoded(scene(1), "PNG"), "b/1.png": encoded(scene(1), "PNG")})
    assert main(["pack", str(tmp_path / "in"), str(tmp_path / "set"), "--workers", "1"]) == 0
    assert main(["stats", str(tmp_path / "set")]) == 0
    assert "equal images             repeated 1, with another label 2\n" in capsys.readouterr().out
    assert main(["stats", str(folder / "other"), "--against", str(folder / "in")]) == 2
    assert "is no shard set" in capsys.readouterr().err


def test_sets_of_one_packing_are_compared_unasked(tmp_path, capsys):
    """Images that became equal in the packing lie on both sides, and every later look says so."""
    files = {
        f"{i}.{end}": encoded(scene(i, 40, 30), kind)
        for i in range(10)
        for end, kind in (("bmp", "BMP"), ("tif", "TIFF"))
    }
    write_folder(tmp_path / "in", files)
    assert main(["pack", str(tmp_path / "in"), str(tmp_path / "out"), "--split", "heldout=0.4", "--workers", "1"]) == 0
    said = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("equal images: ") and " in " in line
    ]
    assert len(said) == 1
    count, _, of = said[0].removeprefix("equal images: ").split(" ")[:3]
    assert 0 < int(count) <= int(of) < 20
    for name in ("train", "heldout"):
        assert main(["verify", str(tmp_path / "out" / name), "--workers", "1"]) == 0
        assert "are byte for byte in" in capsys.readouterr().out
        assert main(["stats", str(tmp_path / "out" / name)]) == 0
        assert "also in " in capsys.readouterr().out
