"""Evaluation in equal shares: each sample counts once, and every rank makes the same number of forwards."""

import pytest
import torch

from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.data.batches import even_batches
from beitforge.pipeline.data.pretraining import evaluation


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("samples", [1, 2, 9, 10])
def test_each_sample_counts_once_and_shapes_are_every_ranks(tiny, world, samples):
    config = load_config(str(tiny.config), [])
    source = evaluation(config, config.data.heldout_images)
    ranks = [
        list(even_batches(config, source, samples=samples, micro=2, rank=rank, world=world)) for rank in range(world)
    ]
    sizes = [[len(batch.samples) for batch, _ in batches] for batches in ranks]
    assert all(others == sizes[0] for others in sizes) and sum(sizes[0]) == -(-samples // world)
    counted = [batch.samples[weights > 0] for batches in ranks for batch, weights in batches]
    assert sorted(torch.cat(counted).tolist()) == list(range(samples))
    weights = torch.cat([weights for batches in ranks for _, weights in batches])
    assert set(weights.tolist()) <= {0.0, 1.0} and int(weights.sum()) == samples


def test_nothing_to_evaluate_is_no_batch(tiny):
    config = load_config(str(tiny.config), [])
    source = evaluation(config, config.data.heldout_images)
    assert not list(even_batches(config, source, samples=0, micro=2, rank=1, world=3))
