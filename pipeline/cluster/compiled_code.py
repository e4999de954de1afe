"""Where what is compiled at run time is kept. It is loaded as code, so nobody else may write there."""

import os
from pathlib import Path

from beitforge.shards.storage.own_folder import default_folder, own_folder

EXTENSIONS = "torch_extensions-"  # begins the names that launchers give to a start's own folder, in $TMPDIR

_OPERATORS, _COMPILED = "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR"


def keep_compiled_code_private() -> None:
    """Make the folders that a launcher, or torch's compiler by itself, would have under a predictable name in $TMPDIR,
    where another user could lay code for us to load. What the user's environment names is the user's.

    Raises shards.storage.own_folder.Unsafe where somebody else has been there.
    """
    operators = Path(os.environ.get(_OPERATORS, ""))
    if operators.name.startswith(EXTENSIONS):
        own_folder(operators, _OPERATORS)
    if not os.environ.get(_COMPILED):
        compiled = default_folder("torchinductor", _COMPILED)
        own_folder(compiled, _COMPILED)
        os.environ[_COMPILED] = str(compiled)
