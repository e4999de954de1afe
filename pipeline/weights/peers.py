"""What transformers and timm compute: from folders written for them, and from foreign checkpoints beside ours.

timm's BEiT stands for the released code's, too: the same model under the same names. The libraries are imported inside
the functions: only who exports to one, or imports from one that is installed, needs it. Must not know shards, deepspeed
or any stage.
"""

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from beitforge.pipeline.config.settings import Config, Model
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.plain_text import shown
from beitforge.pipeline.torchvision_stub import DOES_NOT_LOAD, install
from beitforge.pipeline.weights.foreign import TIMM, TRANSFORMERS, Foreign
from beitforge.pipeline.weights.sources import Saved

Forward = Callable[[Tensor, Tensor | None], Tensor]
TIMM_POOLS = {"mean": "avg", "cls": "token"}


class NotInstalled(ConfigError):
    """A library that cannot be imported."""


def library(name: str, why: str) -> Any:
    """A module of a library. why: begins the message of NotInstalled, which is raised where it does not load."""
    package = name.split(".")[0]
    install()
    try:
        return importlib.import_module(name)
    except DOES_NOT_LOAD as error:
        said = " ".join(str(error).split())[:200]
        raise NotInstalled(
            f"{why} {package} itself, which cannot be imported ({said}): install it with `./launch.sh setup peers`, or "
            f"`pip install {package}`"
        ) from error


def model_class(name: str, why: str) -> Any:
    """A class of transformers, which loads the module behind it only now. As `library`."""
    transformers = library("transformers", why)
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, name)
    except DOES_NOT_LOAD as error:
        raise NotInstalled(f"{why} transformers itself, which has no {name} that loads; update it") from error


def all_loaded(peer: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise ConfigError unless a library has taken every weight, and has no other."""
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing or unexpected:
        raise ConfigError(
            f"{peer} does not take the weights as they are (missing {missing[:3]}, unknown {unexpected[:3]}): its "
            f"version names them otherwise; please report it"
        )


def patches_alone(peer: Any) -> Forward:
    """timm's output without [S], where it is one for every position."""

    def forward(pixels_BCHW: Tensor, mask_BN: Tensor | None) -> Tensor:
        assert mask_BN is None, "timm's BEiT takes no mask"
        found = peer(pixels_BCHW)
        return found[:, 1:] if found.dim() == 3 else found

    return forward


def timm_arguments(model: Model) -> dict[str, Any]:
    """What timm's Beit is built from."""
    return {
        "img_size": list(model.input_size),
        "patch_size": model.patch_size,
        "embed_dim": model.width,
        "depth": model.layers,
        "num_heads": model.heads,
        "mlp_ratio": model.mlp_ratio,
        "init_values": model.layer_scale_init if model.layer_scale else None,
        "use_abs_pos_emb": model.positions == "absolute",
        "use_rel_pos_bias": model.positions == "relative",
        "use_shared_rel_pos_bias": model.positions == "relative_shared",
    }


def source_forward(saved: Saved, found: Foreign, config: Config, hidden: bool, described: dict) -> tuple[str, Forward]:
    """The library of a foreign checkpoint, in words, and what it computes from the checkpoint's own weights and words:
    logits of every patch, a classifier's, or with `hidden` the states [B, S, D] behind the last block.

    described: config.json of transformers for this config, for weights that have none. Raises ConfigError where the
    library does not take the checkpoint, NotInstalled where there is none.
    """
    if found.library == TRANSFORMERS:
        return _transformers_forward(saved, found, hidden, saved.config or described)
    return _timm_forward(saved, found, config.model, hidden)


def _transformers_forward(saved: Saved, found: Foreign, hidden: bool, content: dict) -> tuple[str, Forward]:
    why = "the comparison is made by"
    family = "Data2VecVision" if content.get("model_type") == "data2vec-vision" else "Beit"
    head = len(found.weights.get("head.weight", ()))
    task = "Model" if hidden or not head else "ForImageClassification" if found.classifies else "ForMaskedImageModeling"
    known = set(model_class(f"{family}Config", why)().to_dict())
    said = {name: value for name, value in content.items() if name in known and not name.endswith(("label", "indices"))}
    said = {name: value for name, value in said.items() if not name.startswith(("out_", "stage_", "architectures"))}
    said |= {"use_mean_pooling": True} if hidden else {}
    settings = model_class(f"{family}Config", why)(**said, **({"num_labels": head} if found.classifies else {}))
    pooled = {"add_pooling_layer": found.classifies} if task == "Model" else {}
    kind = model_class(f"{family}{task}", why)
    logging = library("transformers.utils.logging", why)
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing and unknown is judged here
    try:
        peer, report = kind.from_pretrained(
            None, config=settings, state_dict=dict(saved.weights), output_loading_info=True,
            attn_implementation="eager", dtype=torch.float32, **pooled,
        )  # fmt: skip
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        reason = shown(" ".join(str(error).split()))
        raise ConfigError(f"{saved.source}: transformers does not take these weights ({reason})") from error
    finally:
        logging.set_verbosity(before)
    extra = [name for name in report["unexpected_keys"] if not (hidden or "mask_token" in name)]
    all_loaded("transformers", report["missing_keys"], extra)
    peer = peer.eval()

    def forward(pixels_BCHW: Tensor, mask_BN: Tensor | None) -> Tensor:
        if task == "Model":
            out = peer(pixels_BCHW)
            return out.last_hidden_state if hidden else out.pooler_output
        return peer(pixels_BCHW).logits if mask_BN is None else peer(pixels_BCHW, bool_masked_pos=mask_BN).logits

    return f"transformers {library('transformers', why).__version__}", forward


def _timm_forward(saved: Saved, found: Foreign, model: Model, hidden: bool) -> tuple[str, Forward]:
    timm = library("timm", "the comparison is made by")
    beit = library("timm.models.beit", "the comparison is made by")
    renamed = {name.replace("lm_head.", "head."): tensor.float() for name, tensor in saved.weights.items()}
    aside = ("mask_token", "cls_pt_", *(("norm.", "fc_norm.", "head.") if hidden else ()))
    weights = {name: tensor for name, tensor in renamed.items() if not name.startswith(aside)}
    pool = TIMM_POOLS[found.pooling or "mean"] if found.classifies else ""
    arguments = {"qkv_bias": any(name.endswith("q_bias") for name in weights), "global_pool": pool}
    arguments |= {"num_classes": len(weights.get("head.weight", ()))}
    if "blocks.0.gamma_1" not in weights:  # create_model takes None for nothing said, and its models' own for that
        arguments |= {"init_values": 0.0}
    name = str(saved.config.get("architecture", ""))
    try:
        if found.library == TIMM and name in timm.list_models("beit*"):
            said = {**(saved.config.get("model_args") or {}), **arguments}
            size = {"img_size": list(model.input_size)} if "img_size" not in said else {}
            peer = timm.create_model(name, pretrained=False, **{**said, **size})
        else:
            peer = beit.Beit(**{**timm_arguments(model), **arguments})
        report = peer.load_state_dict(weights, strict=False)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"{saved.source}: timm does not take these weights ({why})") from error
    norms = {"norm.weight", "norm.bias", "fc_norm.weight", "fc_norm.bias"} if hidden else set()
    all_loaded("timm", set(report.missing_keys) - norms, report.unexpected_keys)
    words = f"timm {timm.__version__}" + ("" if found.library == TIMM else " (the released code's model)")
    if not hidden:
        return words, patches_alone(peer.eval())
    peer.norm = nn.Identity()
    return words, lambda pixels_BCHW, _: peer.eval().forward_features(pixels_BCHW)
