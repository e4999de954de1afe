"""DeepSpeed's Muon around the groups of pipeline.training.optim.muon_groups (docs/recipe.md, "Muon").

Not by its own configuration, `"type": "Muon"`: that gives Muon every matrix whose name has no "embed" in it, so also
the head and the relative table (deepspeed.set_optimizer_flags). Knows the insides of DeepSpeed 0.19, held by
tests/pipeline/distributed/test_muon.py. Must not know model, shards or any stage.
"""

from collections.abc import Callable

import torch

from beitforge.pipeline.distributed.deepspeed_config import Setup
from beitforge.pipeline.distributed.process_group import quiet_deepspeed


def muon_optimizer(setup: Setup) -> Callable[[list[dict]], torch.optim.Optimizer] | None:
    """What deepspeed.initialize takes as `optimizer`: it makes Muon of the groups; None for AdamW, which the
    configuration names."""
    if not setup.muon:
        return None

    def made(groups: list[dict]) -> torch.optim.Optimizer:
        quiet_deepspeed()
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

        for group in groups:
            group["lr"] = 0.0
            if not group["use_muon"]:
                group |= {"betas": (setup.beta1, setup.beta2), "eps": setup.epsilon}
            for parameter in group["params"]:
                parameter.use_muon = group["use_muon"]
        return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW)

    return made
