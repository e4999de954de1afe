"""Does a tokenizer give our view the tokens of BEiT's? `python -m benchmarks.learning.view_tokens
[TOKENIZER_FOLDER]`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from dall_e import Encoder
from PIL import Image
from torch import Tensor

from beitforge.pipeline.model.pixels import tokenizer_input
from beitforge.pipeline.tokenizers.dvae import Dvae
from beitforge.pipeline.tokenizers.storage import load_tokenizer
from benchmarks.data import views
from benchmarks.results import write

DEMO = Path(__file__).resolve().parents[2] / "runs" / "demo" / "tokenizer"
RANDOM_DRAWS, TRAINED_DRAWS, SEED = 2, 16, 0  # draws of each photograph
_NO_JITTER, _FULL = "no jitter: resize alone", "full view"


def main() -> None:
    """Share of equal tokens, and how decided the unequal ones were, for a random DALL-E encoder and a trained dVAE."""
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO
    rows = rows_of("DALL-E's encoder, random weights", random_dalle(), 112, RANDOM_DRAWS)
    if len(sys.argv) > 1 or given.exists():
        module, identity = load_tokenizer(given)
        assert isinstance(module, Dvae), (
            f"{given} holds a {identity['kind']}: only the own dVAE's logits are known here"
        )
        resample = identity["filter"]
        assert resample.endswith("lanczos"), f"{given} sees images by {resample}, BEiT's by lanczos"
        size = identity["input_size"][0]
        name = f"trained dVAE, {identity['vocabulary']} tokens"
        for used in dict.fromkeys((resample, "torch lanczos")):
            label = name if used == "lanczos" else f"{name}, {used}"
            rows += rows_of(label, module, size, TRAINED_DRAWS, used)
    note = "Tokens of our view against those of the official pipeline on the same draw, both cut to the tokenizer's "
    note += "size. Gap: the official view's best logit minus its second, over the standard deviation of that place's "
    note += "logits; the median over the tokens that differ, and over all. "
    note += "Distinct tokens and the commonest one, of the official views, say what agreeing by chance would be worth."
    write("view_tokens", "does a tokenizer give our view BEiT's tokens?", rows, {}, [note])


def random_dalle() -> Encoder:
    """OpenAI's encoder at full size: vocabulary 8192, 53.79 M parameters, all drawn from SEED."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Encoder()


@torch.no_grad()
def logits_of(tokenizer: Dvae | Encoder, pixels01_BCHW: Tensor) -> Tensor:
    """Logits [B, V, h, w] of pixels in [0, 1]: the own dVAE maps them to 0.8x + 0.1 itself."""
    if isinstance(tokenizer, Dvae):
        return tokenizer.logits(pixels01_BCHW)
    return tokenizer(tokenizer_input(pixels01_BCHW))


def tokens_of(tokenizer: Dvae | Encoder, pixels01_BCHW: Tensor) -> Tensor:
    """Tokens i64 [B, N] of pixels in [0, 1]."""
    return logits_of(tokenizer, pixels01_BCHW).argmax(dim=1).flatten(1)


def view_pairs(draw: views.Draw, size: int, resample: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """What is compared, our view and the official one, [size, size, 3] in 0-255."""
    lanczos = Image.Resampling.LANCZOS
    plain = views.our_cut(draw.pixels, draw, size, resample, np.array([0, 255]))
    yield _NO_JITTER, plain, views.official_cut(draw.pixels, draw, size, lanczos)
    ours = views.our_jitter(views.our_cut(draw.pixels, draw, size, resample), draw)
    yield _FULL, ours, views.official_cut(views.official_jitter(draw), draw, size, lanczos)


def rows_of(name: str, tokenizer: Dvae | Encoder, size: int, count: int, resample: str = "lanczos") -> list[dict]:
    """One row for each of view_pairs, over `count` draws of every photograph, cut by a filter of the loader."""
    compared: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    total, errors = 0, dict.fromkeys((_NO_JITTER, _FULL), 0.0)
    for draw in views.draw_photographs(count):
        views.check(draw)
        total += 1
        for what, ours, official in view_pairs(draw, size, resample):
            errors[what] += float(np.mean((ours.astype(np.float64) - official) ** 2))
            logits = logits_of(tokenizer, _batch(official))
            tokens = logits.argmax(dim=1).flatten(1)
            equal = tokens_of(tokenizer, _batch(ours)) == tokens
            compared.setdefault(what, []).append((equal[0], gaps(logits), tokens[0]))
    rows = []
    for what, pairs in compared.items():
        equal, gap, tokens = (torch.stack(list(column)) for column in zip(*pairs, strict=True))
        uses = tokens.flatten().bincount()
        differing = gap[~equal]
        row = {"tokenizer": name, "what differs": what, "views": total, "tokens a view": equal.shape[1]}
        row["pooled dB"] = "equal" if errors[what] == 0 else f"{views.decibels(errors[what] / total):.1f}"
        row["tokens agree"] = f"{equal.float().mean().item():.2%}"
        row["agree, worst view"] = f"{equal.float().mean(dim=1).min().item():.1%}"
        row["gap, differing"] = f"{differing.median().item():.3f}" if len(differing) else "none"
        row["gap, all"] = f"{gap.median().item():.3f}"
        row["distinct tokens"] = str(int((uses > 0).sum()))
        rows.append({**row, "commonest": f"{(uses.max() / uses.sum()).item():.1%}"})
    assert rows[0]["pooled dB"] != "equal" or rows[0]["tokens agree"] == "100.00%", "equal pixels, other tokens"
    return rows


def gaps(logits_1Vhw: Tensor) -> Tensor:
    """Best logit minus second best, in standard deviations of the place's logits, f32 [N]."""
    best = logits_1Vhw.topk(2, dim=1).values
    return ((best[:, 0] - best[:, 1]) / logits_1Vhw.std(dim=1)).flatten()


def _batch(pixels: np.ndarray) -> Tensor:
    """[H, W, 3] in 0-255 to f32 [1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float()[None] / 255


if __name__ == "__main__":
    main()
