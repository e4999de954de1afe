"""beitforge: BEiT pretraining at cluster scale. The command is `beitforge`.

Scripts find here what docs/python.md describes. Importing the package is instant: a name is loaded when it is first
used, and torch with it where it is needed.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beitforge.api import (
        Features,
        ImageClassifier,
        ImageTokenizer,
        Preprocess,
        features,
        load_classifier,
        load_encoder,
        load_tokenizer,
        save_tokenizer,
        stream,
    )
    from beitforge.pipeline.errors import ConfigError
    from beitforge.shards.errors import ShardError
    from beitforge.shards.format.views import ViewPolicy
    from beitforge.shards.stream.image_set import ImageSet, Sample, open_images
    from beitforge.shards.stream.loader import Batch
    from beitforge.shards.stream.order import OrderPolicy
    from beitforge.shards.stream.view_sources import open_tokens

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "ConfigError",
    "Features",
    "ImageClassifier",
    "ImageSet",
    "ImageTokenizer",
    "OrderPolicy",
    "Preprocess",
    "Sample",
    "ShardError",
    "ViewPolicy",
    "__version__",
    "features",
    "load_classifier",
    "load_encoder",
    "load_tokenizer",
    "open_images",
    "open_tokens",
    "save_tokenizer",
    "stream",
]

_MODULES = {
    "Batch": "shards.stream.loader",
    "ConfigError": "pipeline.errors",
    "ImageSet": "shards.stream.image_set",
    "OrderPolicy": "shards.stream.order",
    "Sample": "shards.stream.image_set",
    "ShardError": "shards.errors",
    "ViewPolicy": "shards.format.views",
    "open_images": "shards.stream.image_set",
    "open_tokens": "shards.stream.view_sources",
}


if not TYPE_CHECKING:  # a type checker that saw it would take any name for a public one

    def __getattr__(name: str) -> Any:
        """Load a public name when it is first used (PEP 562)."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            value = getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'api')}"), name)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ModuleNotFoundError(
                f"beitforge.{name} needs torch: pip install 'beitforge[train]'", name="torch"
            ) from error
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
