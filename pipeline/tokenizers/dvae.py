"""The own tokenizer: a discrete VAE from pixels to visual tokens and back (docs/recipe.md, "Own tokenizer").

Three stride-2 convolutions and residual blocks give logits over the vocabulary for each 8×8 field; the decoder mirrors
them. Training draws from a Gumbel-softmax; a trained tokenizer takes the argmax. Shape letters as in
pipeline.model.beit; h, w: the token grid, E: embedding size. Must not know shards or deepspeed.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import DVAE_STRIDE, Tokenizer
from beitforge.pipeline.model.pixels import from_tokenizer, tokenizer_input
from beitforge.pipeline.tokenizers.published import Published
from beitforge.pipeline.tokenizers.storage import save_tokenizer

_LOGIT_GAIN = 4 / 3**0.5
_SHAPE = ("vocabulary", "width", "embedding", "residual_blocks")


class Residual(nn.Module):
    """x + conv1(relu(conv3(relu(x))))."""

    def __init__(self, width: int):
        super().__init__()
        self.conv3, self.conv1 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv1(F.relu(self.conv3(F.relu(x))))


class Dvae(nn.Module):
    """Encoder, codebook and decoder. Trains on pixels in the range of pixels.tokenizer_input; tokenizes and decodes
    pixels in [0, 1] (pipeline.tokenizers.storage.VisualTokenizer)."""

    decodes = True
    stride = DVAE_STRIDE
    fixed_size: Size | None = None

    def __init__(self, settings: Tokenizer, seed: int):
        """All weights are drawn from `seed` alone."""
        super().__init__()
        width, vocabulary = settings.width, settings.vocabulary
        self.vocabulary = vocabulary
        # torch's own layers draw from the global generator when made; it is put back as it was
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            down = [nn.Conv2d(3, width // 4, 4, 2, 1), nn.ReLU()]
            down += [nn.Conv2d(width // 4, width // 2, 4, 2, 1), nn.ReLU(), nn.Conv2d(width // 2, width, 4, 2, 1)]
            deep = [Residual(width) for _ in range(settings.residual_blocks)]
            logits = nn.Conv2d(width, vocabulary, 1)
            # torch's default leaves the logits so small that the Gumbel noise drowns them for hundreds of steps
            nn.init.normal_(logits.weight, std=_LOGIT_GAIN / width**0.5)
            self.encoder = nn.Sequential(*down, *deep, nn.ReLU(), logits)
            self.codebook_VE = nn.Parameter(torch.randn(vocabulary, settings.embedding))
            rise = [Residual(width) for _ in range(settings.residual_blocks)]
            up = [nn.ConvTranspose2d(width, width // 2, 4, 2, 1), nn.ReLU()]
            up += [nn.ConvTranspose2d(width // 2, width // 4, 4, 2, 1), nn.ReLU()]
            up += [nn.ConvTranspose2d(width // 4, 3, 4, 2, 1)]
            self.decoder = nn.Sequential(nn.Conv2d(settings.embedding, width, 1), *rise, nn.ReLU(), *up)

    def logits(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, V, h, w], h = H / 8, of pixels in [0, 1]."""
        return self._logits(tokenizer_input(pixels_BCHW))

    def _logits(self, mapped_BCHW: Tensor) -> Tensor:
        return self.encoder(mapped_BCHW * 2 - 1)

    def decode_soft(self, weights_BVhw: Tensor) -> Tensor:
        """Mapped pixels [B, 3, H, W] from a weighting of the codebook at each place."""
        return self.decoder(torch.einsum("bvhw,ve->behw", weights_BVhw, self.codebook_VE)) * 0.5 + 0.5

    def forward(self, mapped_BCHW: Tensor, temperature: float, noise_BVhw: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction [B, 3, H, W] and logits [B, V, h, w]. noise_BVhw: standard Gumbel draws."""
        logits_BVhw = self._logits(mapped_BCHW)
        weights_BVhw = ((logits_BVhw + noise_BVhw) / temperature).softmax(dim=1)
        return self.decode_soft(weights_BVhw), logits_BVhw

    @torch.no_grad()
    def tokenize(self, pixels_BCHW: Tensor) -> Tensor:
        """Visual tokens i64 [B, N], N = h · w in row order, of pixels in [0, 1]."""
        return self.logits(pixels_BCHW).argmax(dim=1).flatten(1)

    @torch.no_grad()
    def decode(self, tokens_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] from visual tokens."""
        embedded = F.embedding(tokens_BN.view(len(tokens_BN), *grid), self.codebook_VE).permute(0, 3, 1, 2)
        return from_tokenizer(self.decoder(embedded) * 0.5 + 0.5)


def build(shape: dict) -> Dvae:
    """The module of this shape, its weights still to be loaded."""
    return Dvae(Tokenizer(**shape), seed=0)


def read_published(source: Path) -> Published | None:
    """None: this kind is trained here and published nowhere else."""
    return None


def save_dvae(folder: Path, dvae: Dvae, settings: Tokenizer) -> str:
    """Write a trained tokenizer; returns its fingerprint."""
    shape = {name: getattr(settings, name) for name in _SHAPE}
    return save_tokenizer(folder, dvae.state_dict(), "dvae", shape, settings.input_size, settings.filter)
