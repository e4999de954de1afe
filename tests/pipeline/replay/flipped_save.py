"""`… flip-N VERB …`: runs `beitforge VERB …`; in checkpoint N the largest number of one weight has another sign than in
the run, which goes on with its own: what a node with a bad memory may save.
"""

import sys
from typing import Any

from beitforge.__main__ import main
from beitforge.pipeline.checkpoints import live_layout, saver

STEP = int(sys.argv.pop(1).partition("-")[2])
WEIGHT = "blocks.1.fc2.weight"
save = saver.Saver.save


def flip(engine: Any) -> None:
    for name, piece in live_layout.engine_pieces(engine):
        if name == WEIGHT and "fp32" in piece.values:
            piece.values["fp32"][piece.values["fp32"].abs().argmax()] *= -1


def save_flipped(self: saver.Saver, state: Any) -> bool:
    if state.step == STEP:
        flip(self.engine)
    done = save(self, state)
    if state.step == STEP:
        flip(self.engine)
    return done


saver.Saver.save = save_flipped  # type: ignore[method-assign]
if __name__ == "__main__":
    raise SystemExit(main())
