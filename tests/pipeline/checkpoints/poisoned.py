"""A process of test_integrity.py: `python -m tests.pipeline.checkpoints.poisoned VALUE beitforge …` is `beitforge …`
where memory that nobody has set holds VALUE."""

import functools
import runpy
import sys
from typing import Any

import torch


def poison(value: float) -> None:
    def filled(made: Any) -> Any:
        @functools.wraps(made)
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = made(*args, **kwargs)
            return tensor.detach().fill_(value) if tensor.is_floating_point() and not tensor.is_meta else tensor

        return call

    for name in ("empty", "empty_like", "empty_strided"):
        setattr(torch, name, filled(getattr(torch, name)))
    torch.Tensor.new_empty = filled(torch.Tensor.new_empty)  # type: ignore[method-assign]


if __name__ == "__main__":
    _, value, module, *sys.argv[1:] = sys.argv
    poison(float(value))
    runpy.run_module(module, run_name="__main__", alter_sys=True)
