"""`… WHEN VERB …`: runs `beitforge VERB …`, killed by SIGKILL at `saved-N`, when checkpoint N is complete, or at
`evaluating-N`, when the evaluation after step N begins; or `never`.
"""

import os
import signal
import sys
from typing import Any

from beitforge.__main__ import main
from beitforge.pipeline.checkpoints.saver import Saver
from beitforge.pipeline.evaluation.evaluations import Evaluations

when, _, step = sys.argv.pop(1).partition("-")
finish, judge = Saver.finish, Evaluations.__call__


def finish_and_die(self: Saver) -> None:
    finish(self)
    if when == "saved" and (self.run / "checkpoints" / f"step-{step}" / "state.json").exists():
        os.kill(os.getpid(), signal.SIGKILL)


def die_judging(self: Evaluations, engine: Any, done: int) -> dict:
    if when == "evaluating" and done == int(step):
        os.kill(os.getpid(), signal.SIGKILL)
    return judge(self, engine, done)


Saver.finish, Evaluations.__call__ = finish_and_die, die_judging  # type: ignore[method-assign]
if __name__ == "__main__":
    raise SystemExit(main())
