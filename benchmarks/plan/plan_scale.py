"""What happens to a step from 1 to 4,096 GPUs, and how often to save there? Simulated; nothing is measured."""

from pathlib import Path

from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.plan.assumptions import Assumptions
from beitforge.pipeline.plan.estimate import Estimate, Machine, estimate
from beitforge.pipeline.plan.failures import simulated_goodput
from beitforge.pipeline.plan.hardware import CHIPS, NETWORKS, STORAGES
from benchmarks.results import write

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "beit_large_in22k.yaml"
IMAGES, EACH = 14_200_000, 64
BESIDE = "deepspeed.zero_optimization={overlap_comm: true, reduce_bucket_size: 25000000}"
WAYS: tuple[tuple[str, int, list[str]], ...] = (
    ("ZeRO-2 as it comes", 2, []),
    ("ZeRO-2, overlapped", 2, [BESIDE]),
    ("ZeRO-3", 3, []),
)


def config_of(gpus: int, settings: list[str]) -> Config:
    return load_config(str(CONFIG), [f"train.global_batch={EACH * gpus}", f"train.micro_batch={EACH}", *settings])


def line(gpus: int, way: str, row: Estimate, restart: float) -> dict:
    life = row.life
    lived = simulated_goodput(life.best_every, row.stall, restart, row.mtbf, segments=20_000)
    return {
        "GPUs": gpus,
        "way": way,
        "sent by each, GB": row.sent / 1e9,
        "hidden": f"{row.step.hidden:.0%}" if row.step.busy else "-",
        "compute, ms": life.compute * 1e3,
        "network": life.exposed * 1e3,
        "late": life.late * 1e3,
        "starved": life.starved * 1e3,
        "images/s": f"{row.images_per_second:.0f}",
        "fails every, h": row.mtbf / 3600,
        "save every, min": f"{life.best_every / 60:.1f}",
        "Young / Daly": f"{life.young / 60:.1f} / {life.daly / 60:.1f}",
        "goodput": f"{life.running * life.best_survived:.1%}",
        "left by failures": f"{life.best_survived:.3%}",
        "simulated": f"{lived:.3%}",
        "_lived": abs(lived / life.best_survived - 1),
    }


def main() -> None:
    """Weak scaling: as many images on every GPU."""
    machine = Machine(CHIPS[4], NETWORKS[0], STORAGES[1], Assumptions())
    rows = []
    for gpus in (1, 8, 64, 512, 4096):
        for way, stage, settings in WAYS:
            row = estimate(config_of(gpus, settings), machine, gpus, stage, images=IMAGES)
            rows.append(line(gpus, way, row, machine.assumed.restart_seconds))
    chip, network, storage = machine.chip, machine.network, machine.storage
    notes = [
        f"BEiT-Large, {EACH} images a GPU and step, on {chip.name} ({chip.per_node} a node), {network.source}, "
        f"{storage.source}; `plan`'s defaults. A step is that of the slowest rank. Failures: "
        f"{machine.assumed.failures_per_gpu_day:g} a GPU and day (arXiv 2407.21783), a restart "
        f"{machine.assumed.restart_seconds:.0f} s. The interval is the best of Daly's exponential form; beside it "
        "Young's and Daly's estimates, and what is left when 20,000 intervals are lived through one by one."
    ]
    worst = max(row["_lived"] for row in rows)
    write("plan_scale", "1 to 4,096 GPUs, simulated", rows, {"simulated / closed form, off by at most": worst}, notes)


if __name__ == "__main__":
    main()
