"""Counts operations and host reads of a training step for tests.pipeline.distributed.test_optimizer_step, by rank.

Operations that are no view stand for kernel launches. A read is a value that Python takes from a tensor that the device
computed; what the step's one copy brought to the host, and what is computed from that, is on the host already.
"""

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Model
from beitforge.pipeline.distributed.deepspeed_config import Setup
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.distributed.process_group import destroy_process_group, start_world
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.training.loop import Meter, _step
from beitforge.pipeline.training.optim import parameter_groups

CASES = [(stage, precision) for stage in range(4) for precision in ("bf16", "fp32")]
LAYERS, CLIP, RATE = 12, 3.0, 1e-2
VIEWS = re.compile(  # what launches nothing
    r"aten\.(view|_unsafe_view|transpose|permute|t\.default|expand|slice|select|unsqueeze|squeeze|narrow|detach|alias|"
    r"as_strided|split|unbind|empty|reshape|lift|record_stream|is_)"
)
WORLD = start_world()

import deepspeed  # noqa: E402  (start_world has made it quiet)


class Count(TorchDispatchMode):
    """Operations by name, and reads."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.host: dict[int, torch.Tensor] = {}
        self.reads = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(function)] += 1
        result = function(*args, **(kwargs or {}))
        taken = [arg for arg in torch.utils._pytree.tree_leaves(args) if isinstance(arg, torch.Tensor)]
        on_host = bool(taken) and all(id(tensor) in self.host for tensor in taken)
        if "local_scalar_dense" in str(function) and not on_host:
            self.reads += 1
        if on_host and isinstance(result, torch.Tensor):
            self.host[id(result)] = result  # kept, or another tensor could get its id
        return result

    def kernels(self) -> int:
        return sum(n for name, n in self.names.items() if not VIEWS.match(name))

    def counted(self, engine: Engine, run: Callable[[], Any]) -> Any:
        """Run it; what the engine's agreement copies to the host is read once."""
        reading = engine.agreement._read

        def read() -> torch.Tensor:
            tensor = reading()
            self.reads += id(tensor) not in self.host
            self.host[id(tensor)] = tensor
            return tensor

        engine.agreement._read = read
        with self:
            result = run()
        del engine.agreement._read
        return result


def engine_of(stage: int, precision: str, compile_mode: str = "", overrides: dict | None = None) -> Engine:
    model = Model(input_size=Size(32, 32), patch_size=16, layers=LAYERS, width=16, heads=2, drop_path=0.1)
    beit = Beit(model, 32, 0)
    setup = Setup(
        global_batch=WORLD.size, micro_batch=1, accumulation=1, precision=precision, zero_stage=stage,
        offload_optimizer=False, compile=bool(compile_mode), compile_mode=compile_mode, clip_norm=CLIP, beta1=0.9,
        beta2=0.999, epsilon=1e-8, overrides=overrides or {},
    )  # fmt: skip
    return Engine(beit, parameter_groups(beit, 0.05), setup, WORLD)


def one_step(engine: Engine, count: Count, factor: float) -> tuple[bool, float, bool]:
    """The loop's step on one image, with the loss times `factor`."""
    generator = torch.Generator().manual_seed(WORLD.rank)
    pixels = torch.randn(1, 3, 32, 32, generator=generator).to(engine.dtype)
    mask, keep = torch.tensor([[True, True, False, False]]), torch.ones(1, LAYERS, 2, dtype=torch.bool)
    tokens = torch.randint(32, (1, 4), generator=generator)

    def objective(model: Callable, batch: object, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, _, masked = model(pixels, mask, 2, keep, tokens)
        return loss / masked * factor, {}

    components = SimpleNamespace(
        objective=objective,
        rate=lambda _: RATE,
        decay=None,
        stop=lambda: "",
        saving=SimpleNamespace(busy=WORLD.rank == 1, open=False),
        recovery=SimpleNamespace(
            update_applied=lambda: None, skipped=lambda fault: str(fault.ranks), consecutive=[None]
        ),
        metrics=SimpleNamespace(write=lambda *_: None),
        sample_log=None,
    )
    batch = SimpleNamespace(bad=[], samples=torch.tensor([0]))
    prefetcher: Any = SimpleNamespace(next=lambda: (batch, batch), prefetch=lambda: None, waiting=None)
    meter = Meter(engine, prefetcher.waiting)
    return count.counted(engine, lambda: _step(engine, prefetcher, 0, meter, components))


def state(engine: Engine) -> list[torch.Tensor]:
    """Copies of the weights, the masters and what the optimizer keeps."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    values = [value for kept in optimizer.state.values() for value in kept.values() if torch.is_tensor(value)]
    masters = [master for group in optimizer.param_groups for master in group["params"]]
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=engine.setup.zero_stage == 3):
        return [copy.deepcopy(tensor.detach()) for tensor in (*engine.module.parameters(), *masters, *values)]


def found_in(stage: int, precision: str) -> dict:
    engine = engine_of(stage, precision)
    parameters = len(list(engine.module.parameters()))
    for _ in range(3):
        whole = Count()
        _, norm, updated = one_step(engine, whole, 1.0)
    ending, before = Count(), state(engine)
    engine.backward(loss_of(engine))
    ending.counted(engine, lambda: engine.step(RATE))
    changed = not same(before, state(engine))
    before = state(engine)
    _, broken_norm, broken = one_step(engine, Count(), math.nan if WORLD.rank == WORLD.size - 1 else 1.0)
    kept = same(before, state(engine))
    _, again, healed = one_step(engine, Count(), 1.0)
    return {
        "stage": stage,
        "precision": precision,
        "parameters": parameters,
        "step": whole.kernels(),
        "reads": whole.reads,
        "norm": norm,
        "updated": updated,
        "ending": ending.kernels(),
        "norms": sum(n for name, n in ending.names.items() if "norm" in name),
        "reductions": sum(n for name, n in ending.names.items() if "allreduce" in name),
        "changed": changed,
        "kept": [kept, not broken, not math.isfinite(broken_norm)],
        "healed": [healed, math.isfinite(again)],
    }


def compiled_with() -> dict:
    """What torch.compile would be called with; compiling takes a C++ compiler and a minute."""
    asked: dict = {}
    deepspeed.DeepSpeedEngine.compile = lambda _, **named: asked.update(named)
    engine_of(2, "bf16", "reduce-overhead")
    return asked["compile_kwargs"]


def loss_of(engine: Engine) -> torch.Tensor:
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    mask, keep = torch.tensor([[True, True, False, False]]), torch.ones(1, LAYERS, 2, dtype=torch.bool)
    return engine.model(torch.ones(1, 3, 32, 32).to(engine.dtype), mask, 2, keep, tokens)[0]


def same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def main() -> None:
    findings = [found_in(*case) for case in CASES]
    compiled, limited = compiled_with(), engine_of(2, "bf16", overrides={"gradient_clipping": 0.25})
    if WORLD.first:
        print(json.dumps({"steps": findings, "compiled": compiled, "clip_norm": limited.agreement.clip_norm}))
    destroy_process_group()


if __name__ == "__main__":
    main()
