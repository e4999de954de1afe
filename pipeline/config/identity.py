"""Which settings make a run the same run, and which a host may have to itself. Must not know torch."""

import hashlib
import json

from beitforge.pipeline.config.loading import to_dict
from beitforge.pipeline.config.settings import Config

# Settings that every host of a run may have to itself: where things are, and how they are loaded.
OF_HOST = {
    "data": {
        "images",
        "tokens",
        "heldout_images",
        "heldout_tokens",
        "labelled_images",
        "labelled_test",
        "tokenizer",
        "cache",
        "cache_gb",
    },
    "loader": {"workers", "prefetch", "decoder"},
}
# Settings that change no number of a run, or whose meaning is guarded by fingerprints; the rest is its identity.
_FREE = {**OF_HOST, "data": OF_HOST["data"] | {"bad_sample_budget"}, "model": {"kernels"}, "deepspeed": set()}
_FREE |= {"train": {"run", "micro_batch", "zero_stage", "offload_optimizer", "activation_checkpointing", "compile"}}
_FREE |= {"finetune": {"run", "micro_batch", "test_every"}}
_FREE |= {"tokenizer": {"micro_batch", "precision"}}


def identity(config: Config, sections: tuple[str, ...]) -> dict[str, dict]:
    """The settings that a run cannot change and still be the same run: of each of `sections` all that count, or of
    `section.key` that one."""
    tree = to_dict(config)
    found: dict[str, dict] = {}
    for entry in sections:
        section, _, only = entry.partition(".")
        names = {only} if only else tree[section].keys() - _FREE.get(section, set())
        found[section] = found.get(section, {}) | {n: value for n, value in tree[section].items() if n in names}
    return found


def identity_digest(config: Config, sections: tuple[str, ...]) -> str:
    """The identity in 16 hex digits."""
    return hashlib.sha256(json.dumps(identity(config, sections), sort_keys=True).encode()).hexdigest()[:16]
