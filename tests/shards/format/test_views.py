"""Views: frozen records, the same drawn alone or together, inside the image, distributed as the policy says."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import xxhash

from beitforge.shards import counter_rng
from beitforge.shards.format.levels import Greys, tone_table, without_tones
from beitforge.shards.format.views import FIELDS, JITTER_ORDERS, ViewPolicy, Views, central_views, draw_views

SIZES = [(1, 1), (1, 2), (2, 1), (3, 5000), (5000, 3), (7, 7), (64, 48), (500, 375), (375, 500), (65_500, 60_000)]


def drawn(policy: ViewPolicy, count: int, width: int, height: int, number: int = 0) -> Views:
    """Views of `count` images of one size."""
    keys = np.arange(count, dtype=np.uint64)
    return draw_views(policy, keys, number, np.full(count, width), np.full(count, height), greys(count))


def greys(count: int) -> Greys:
    return without_tones(np.full(count, 100, np.float32))


def test_golden_record():
    """draw_views(ViewPolicy(seed=7), [1, 2**64 - 1, 12345], numbers [0, 1, 2], widths [500, 333, 1], heights [375, 500,
    1]). A change makes every token set unreproducible."""
    keys = np.array([1, 2**64 - 1, 12345], dtype=np.uint64)
    sizes = np.array([500, 333, 1]), np.array([375, 500, 1])
    views = draw_views(ViewPolicy(seed=7), keys, np.array([0, 1, 2]), *sizes, greys(3))
    assert views.boxes.tolist() == [[88, 103, 188, 184], [0, 99, 312, 327], [0, 0, 1, 1]]
    assert views.flips.tolist() == [1, 0, 0]
    assert views.orders.tolist() == [2, 1, 1]
    golden = [
        [0.8241108655929565, 0.732457160949707, 1.1266250610351562],
        [0.6478037238121033, 0.8632469773292542, 0.6815845370292664],
        [1.195036768913269, 1.0348559617996216, 1.072420597076416],
    ]
    assert views.jitters.tolist() == golden


def thousand() -> Views:
    """Of a thousand images whose crops often need several tries, some all ten."""
    keys = counter_rng.bits(99, np.arange(1000))
    sides = 300 + (keys % np.uint64(300)).astype(np.int64), 200 + (keys >> np.uint64(9)).astype(np.int64) % 500
    policy = ViewPolicy(seed=5, area_min=0.5, aspect_max=2.0)
    return draw_views(policy, keys, np.arange(1000), *sides, greys(1000))


def test_golden_records_of_a_thousand():
    """xxh3 of each field."""
    views = thousand()
    assert {name: xxhash.xxh3_64_hexdigest(getattr(views, name).tobytes()) for name in FIELDS} == {
        "boxes": "80d707552e6c0cad",
        "flips": "f8650dea8be5b555",
        "jitters": "a0177fe3143ae69a",
        "orders": "7ee337a97781aeec",
        "levels": "7750655b5948adc0",
    }


def test_what_is_settled_is_drawn_no_more(monkeypatch):
    """One call a try, for the crops that did not fit before, and one for everything else."""
    asked, uniform = [], counter_rng.uniform
    monkeypatch.setattr(counter_rng, "uniform", lambda *words: asked.append((found := uniform(*words)).shape) or found)
    thousand()
    rows = [shape[0] for shape in asked[:-1]]
    assert asked[-1] == (1000, 5) and len(rows) == 10
    assert rows[0] == 1000 and all(following <= before for before, following in itertools.pairwise(rows))
    assert 0 < rows[-1] < 400


def test_types_are_those_of_the_record():
    views = drawn(ViewPolicy(), 2, 30, 40)
    assert [getattr(views, name).dtype for name in FIELDS] == [np.uint32, np.uint8, np.float32, np.uint8, np.uint8]
    assert [getattr(views, name).shape for name in FIELDS] == [(2, 4), (2,), (2, 3), (2,), (2, 3)]


def test_a_view_depends_on_its_image_alone():
    """Together, one by one, or in another order: the same records."""
    count = 40
    keys = counter_rng.bits(99, np.arange(count))
    numbers, widths, heights = np.arange(count) % 5, 1 + 13 * np.arange(count), 1 + 700 // (1 + np.arange(count))

    def tables(rows: np.ndarray) -> Greys:
        """Of a made-up image each; some have no tone table."""
        tones = [tone_table((counter_rng.bits(98, np.full(768, row), np.arange(768)) % 9).tolist()) for row in rows]
        return Greys((rows * 6.3).astype(np.float32), np.array(tones, np.uint16) * (rows[:, None] % 3 != 0))

    def views(rows: np.ndarray) -> Views:
        return draw_views(ViewPolicy(seed=3), keys[rows], numbers[rows], widths[rows], heights[rows], tables(rows))

    together, shuffle = views(np.arange(count)), counter_rng.permutation(count, 1)
    shuffled, alone = views(shuffle), [views(np.array([row])) for row in range(count)]
    for name in FIELDS:
        assert np.array_equal(getattr(together, name)[shuffle], getattr(shuffled, name))
        assert np.array_equal(getattr(together, name), np.concatenate([getattr(one, name) for one in alone]))


def test_one_number_for_all_is_an_array_of_it():
    keys, sides = np.arange(9, dtype=np.uint64), np.full(9, 50)
    one, many = (draw_views(ViewPolicy(), keys, number, sides, sides, greys(9)) for number in (4, np.full(9, 4)))
    assert one.boxes.tolist() == many.boxes.tolist()


@pytest.mark.parametrize("change", [{"seed": 1}, {"number": 1}, {"key": 1}])
def test_seed_number_and_key_each_change_the_view(change):
    def view(seed: int = 0, number: int = 0, key: int = 0) -> Views:
        sides = np.array([400]), np.array([300])
        return draw_views(ViewPolicy(seed=seed), np.array([key], np.uint64), number, *sides, greys(1))

    assert view().boxes.tolist() != view(**change).boxes.tolist()
    assert view().jitters.tolist() != view(**change).jitters.tolist()


def plain_box(policy: ViewPolicy, key: int, number: int, width: int, height: int) -> list[int]:
    """torchvision's RandomResizedCrop.get_params, one image at a time, driven by the same uniform numbers."""

    def uniform(what: int, attempt: int) -> float:
        return float(counter_rng.uniform(counter_rng.VIEW, policy.seed, key, number, what, attempt)[0])

    for attempt in range(10):
        area = width * height * (policy.area_min + (policy.area_max - policy.area_min) * uniform(0, attempt))
        log_ratio = math.log(policy.aspect_min), math.log(policy.aspect_max)
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * uniform(1, attempt))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(uniform(2, attempt) * (width - w + 1)), int(uniform(3, attempt) * (height - h + 1)), w, h]
    w, h = width, height
    if width / height < policy.aspect_min:
        h = round(width / policy.aspect_min)
    elif width / height > policy.aspect_max:
        w = round(height * policy.aspect_max)
    w, h = max(w, 1), max(h, 1)
    return [(width - w) // 2, (height - h) // 2, w, h]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("policy", [ViewPolicy(seed=5), ViewPolicy(area_min=0.9, aspect_min=0.5, aspect_max=0.6)])
def test_boxes_are_torchvisions_and_inside_the_image(policy, width, height):
    count = 60
    boxes = drawn(policy, count, width, height, number=2).boxes.astype(np.int64)
    assert boxes.tolist() == [plain_box(policy, key, 2, width, height) for key in range(count)]
    x, y, w, h = boxes.T
    assert min(w.min(), h.min()) >= 1
    assert (x + w <= width).all()
    assert (y + h <= height).all()


def test_boxes_reach_every_edge():
    """Offsets are drawn from all places, first and last included."""
    x, y, w, h = drawn(ViewPolicy(area_min=0.3, area_max=0.5), 5000, 20, 20).boxes.astype(np.int64).T
    assert x.min() == y.min() == 0
    assert (20 - x - w).min() == (20 - y - h).min() == 0


def test_area_and_aspect_follow_the_policy():
    """Where every try fits (half of a large square), the area is uniform and the aspect log-uniform."""
    policy = ViewPolicy(area_min=0.08, area_max=0.5)
    _, _, w, h = drawn(policy, 20_000, 2000, 2000).boxes.astype(float).T
    area, log_aspect = w * h / 4e6, np.log(w / h)
    assert 0.0798 < area.min() < 0.081
    assert 0.499 < area.max() < 0.5002
    assert area.mean() == pytest.approx(0.29, abs=0.003)
    assert area.std() == pytest.approx(0.42 / math.sqrt(12), abs=0.002)
    assert log_aspect.min() == pytest.approx(-math.log(4 / 3), abs=0.004)
    assert log_aspect.max() == pytest.approx(math.log(4 / 3), abs=0.004)
    assert abs(log_aspect.mean()) < 0.004
    assert log_aspect.std() == pytest.approx(2 * math.log(4 / 3) / math.sqrt(12), abs=0.003)
    assert abs(np.corrcoef(area, log_aspect)[0, 1]) < 0.02


@pytest.mark.parametrize("flip", [0.0, 0.25, 1.0])
def test_flips_follow_the_policy(flip):
    assert drawn(ViewPolicy(flip=flip), 20_000, 9, 9).flips.mean() == pytest.approx(flip, abs=0.01 * (0 < flip < 1))


def test_jitter_follows_the_policy():
    """Factors uniform in 1 ± the half-width and never negative (torchvision's ColorJitter); all six orders alike."""
    policy = ViewPolicy(brightness=0.4, contrast=0.2, saturation=1.5)
    views = drawn(policy, 20_000, 9, 9)
    for column, (low, high) in enumerate([(0.6, 1.4), (0.8, 1.2), (0.0, 2.5)]):
        factors = views.jitters[:, column].astype(float)
        assert low - 1e-6 <= factors.min() < low + 0.002 * (high - low)
        assert high - 0.002 * (high - low) < factors.max() <= high + 1e-6
        assert factors.mean() == pytest.approx((low + high) / 2, abs=0.01 * (high - low))
        assert factors.std() == pytest.approx((high - low) / math.sqrt(12), rel=0.02)
    assert np.abs(np.corrcoef(views.jitters.T) - np.eye(3)).max() < 0.03
    counts = np.bincount(views.orders, minlength=6)
    assert len(counts) == 6
    assert np.abs(counts - 20_000 / 6).max() < 250


def test_no_jitter_is_exactly_one():
    """Factor 1 changes nothing, to the last bit; each alone can be off."""
    for name, column in (("brightness", 0), ("contrast", 1), ("saturation", 2)):
        jitters = drawn(dataclasses.replace(ViewPolicy(), **{name: 0.0}), 1000, 9, 9).jitters
        assert (jitters[:, column] == 1.0).all()
        assert all((jitters[:, other] != 1.0).any() for other in {0, 1, 2} - {column})


def test_jitter_orders_are_the_permutations():
    assert JITTER_ORDERS.tolist() == [list(order) for order in itertools.permutations(range(3))]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_central_views(width, height):
    """A square of 7/8 of the shorter side in the middle, unflipped, unjittered."""
    views = central_views(np.array([width]), np.array([height]))
    x, y, w, h = views.boxes[0].tolist()
    assert w == h == max(1, round(min(width, height) * 0.875))
    assert abs(width - w - 2 * x) <= 1
    assert abs(height - h - 2 * y) <= 1
    assert views.flips.tolist() == [0]
    assert views.jitters.tolist() == [[1, 1, 1]]
