"""Processes of test_saver.py: `… save FOLDER STAGE` writes a checkpoint of many equal layers,
`… export FOLDER STAGE OUT` streams it out and prints by how many bytes memory of the process's own grew at most."""

import sys
from pathlib import Path

from beitforge.pipeline.checkpoints import live_layout, zero_layout
from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Config, Model
from beitforge.pipeline.distributed.deepspeed_config import Setup
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.distributed.process_group import destroy_process_group, start_world
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.runs.checkpoints import State
from beitforge.pipeline.training.optim import parameter_groups
from beitforge.pipeline.weights.encoder import Trained, stream_encoder

MODEL = Model(input_size=Size(32, 32), patch_size=8, layers=24, width=192, heads=3)  # 43 MB, the largest tensor 0.6


def beit() -> Beit:
    return Beit(MODEL, 64, seed=1)


def save(folder: Path, stage: int) -> None:
    """As one process saves it."""
    world, model = start_world(), beit()
    setup = Setup(
        global_batch=1, micro_batch=1, accumulation=1, precision="fp32", zero_stage=stage, offload_optimizer=False,
        compile=False, clip_norm=1.0, beta1=0.9, beta2=0.99, epsilon=1e-8, overrides={},
    )  # fmt: skip
    engine = Engine(model, parameter_groups(model, 0.05), setup, world)
    live_layout.engine_pieces(engine, 1.0)  # an optimizer that has stepped once
    engine.deepspeed.save_checkpoint(str(folder), tag=f"stage-{stage}", save_latest=False)
    destroy_process_group()


def own_memory() -> int:
    """Bytes of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def export(folder: Path, stage: int, out: Path) -> None:
    """Through the exporter's own code."""
    model = beit()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names[id(parameter)] for parameter in group["params"]] for group in parameter_groups(model, 0.05)]
    del model
    saved = zero_layout.open_checkpoint(folder / f"stage-{stage}", stage, groups)
    state = State(step=1, samples_seen=1, world=1, zero_stage=stage, precision="fp32", images="", tokens="", config="")
    most = before = 0

    def each():  # type: ignore[no-untyped-def]
        nonlocal most, before
        before = most = own_memory()
        for item in saved.weights():
            yield item
            most = max(most, own_memory())

    stream_encoder(out, Trained(saved.shapes, each, state), Config())
    print(most - before)


if __name__ == "__main__":
    if sys.argv[1] == "save":
        save(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        export(Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
