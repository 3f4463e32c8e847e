"""How the next token is chosen, such that somebody else can check the choice later.

Greedy takes the largest logit. Sampling is Gumbel-max: with z = logits / temperature and independent g_v ~
Gumbel(0, 1),

    argmax_v (z_v + g_v)   is a draw from softmax(z),

and the noise g is a pure function of (seed, nonce of the request, index of the output token). A verifier that
knows the three rebuilds g and asks by how much the claimed token loses to its own winner: the *margin*, 0 for
an honest token unless the two were nearly level. Source: token-DiFR (arXiv 2511.20621). Top-p keeps the
smallest set of most likely tokens whose probability reaches p; the noise decides within it.

The noise comes from NumPy's Philox bit stream, which is specified and the same on every machine, keyed by
SHA-256. It is drawn on the CPU: about 1 ms for a token of a 50,000-word vocabulary.

A host that may choose its seed may choose among answers, so the verifier names the seed, or lets it follow
from its nonce (`seed_of`, `NonceSampler`).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitassay.errors import BitassayError
from bitassay.models.precision import exact

# In nats: a token on the rim of the nucleus may lose by any amount, and one token must not decide a mean.
MARGIN_CAP = 10.0
# So many most likely tokens are looked through for the nucleus before all are, which takes longer.
NUCLEUS_SIZES = (1024, 8192)
ROWS = 64  # rows of the vocabulary's size in float64 that exist at a time


@dataclass(frozen=True)
class Draw:
    """Which noise: the request's nonce and the index of the token among its output tokens, from 0."""

    nonce: str
    index: int


@dataclass(frozen=True)
class Sampler:
    """How tokens are chosen. temperature 0 is greedy, and then top_p and seed have no effect."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature <= 100 and math.isfinite(self.temperature)):
            raise BitassayError(f"temperature {self.temperature} is not between 0 and 100", "0 is greedy")
        if not 0 < self.top_p <= 1:
            raise BitassayError(f"top_p {self.top_p} is not in (0, 1]", "1 keeps every token")
        if not 0 <= self.seed < 2**63:
            raise BitassayError(f"seed {self.seed} is not between 0 and 2^63 - 1")

    @property
    def name(self) -> str:
        return "gumbel-max" if self.temperature else "greedy"

    def of_request(self, nonce: str) -> "Sampler":
        """Return the sampler, with its seed, of the request with this nonce."""
        return self

    def choose(self, logits: Float[Tensor, "rows vocabulary"], draws: Sequence[Draw]) -> Int[Tensor, " rows"]:
        """Return the token id that this sampler takes in each row."""
        if not self.temperature:
            return logits.argmax(-1)
        _, noisy, kept = self._perturb(logits, draws)
        return noisy.masked_fill(~kept, -torch.inf).argmax(-1).to(logits.device)

    def margins(
        self, logits: Float[Tensor, "rows vocabulary"], claimed: Int[Tensor, " rows"], draws: Sequence[Draw]
    ) -> Float[Tensor, " rows"]:
        """Return by how many nats each claimed token loses to the one that `logits` would choose; 0 where it
        is that one. At most MARGIN_CAP, which also stands for logits that are not finite.

        A claimed token outside the nucleus also pays for the gap between its logit and the smallest one
        inside.
        """
        margins = torch.zeros(len(claimed), dtype=torch.float64)
        for start in range(0, len(claimed), ROWS):
            rows = slice(start, start + ROWS)
            margins[rows] = self.margins_and_scores(logits[rows], claimed[rows], draws[rows])[0]
        return margins

    def scores(
        self, logits: Float[Tensor, "rows vocabulary"], draws: Sequence[Draw]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Return what the sampler maximises in each row, in float64: the logits, or for a temperature these
        over it with noise; minus infinity for tokens that top-p leaves out."""
        if not self.temperature:
            return exact(logits)
        _, noisy, kept = self._perturb(logits, draws)
        return noisy.masked_fill(~kept, -torch.inf)

    def margins_and_scores(
        self, logits: Float[Tensor, "rows vocabulary"], claimed: Int[Tensor, " rows"], draws: Sequence[Draw]
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocabulary"]]:
        """Return the `margins` and the `scores` of a few rows, for which the noise is drawn once."""
        if not self.temperature:
            scores = exact(logits)
            margins = scores.amax(-1) - scores.gather(1, claimed[:, None].to(scores.device))[:, 0]
        else:
            scaled, noisy, kept = self._perturb(logits, draws)
            scores, taken = noisy.masked_fill(~kept, -torch.inf), claimed[:, None].to(scaled.device)
            loses_by = scores.amax(-1) - noisy.gather(1, taken)[:, 0]
            outside_by = scaled.masked_fill(~kept, torch.inf).amin(-1) - scaled.gather(1, taken)[:, 0]
            margins = loses_by.clamp(min=0) + outside_by.clamp(min=0)
        return margins.cpu().nan_to_num(nan=MARGIN_CAP).clamp(0, MARGIN_CAP), scores

    def _perturb(
        self, logits: Float[Tensor, "rows vocabulary"], draws: Sequence[Draw]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled logits, the same with noise, and which tokens are in the nucleus; all in float64."""
        scaled = exact(logits) / self.temperature
        size = logits.shape[-1]
        noise = np.stack([gumbel_noise(self.of_request(draw.nonce).seed, draw, size) for draw in draws])
        return scaled, scaled + torch.from_numpy(noise).to(scaled.device), nucleus(scaled, self.top_p)


class NonceSampler(Sampler):
    """A sampler whose seed is `seed_of` the nonce of each request."""

    def of_request(self, nonce: str) -> Sampler:
        return Sampler(self.temperature, self.top_p, seed_of(nonce))


GREEDY = Sampler()


def seed_of(nonce: str) -> int:
    """Return the seed that follows from a request's nonce: the first 8 bytes of SHA-256("bitassay seed 1", a
    byte 0, the nonce in UTF-8), little-endian, without the highest bit."""
    digest = hashlib.sha256(b"bitassay seed 1\0" + nonce.encode()).digest()
    return int.from_bytes(digest[:8], "little") % 2**63


def gumbel_noise(seed: int, draw: Draw, size: int) -> np.ndarray:
    """Return `size` independent Gumbel(0, 1) numbers in float64: g = -log(-log u), u uniform on (0, 1)."""
    key = hashlib.sha256(f"bitassay gumbel 1\0{seed}\0{draw.nonce}\0{draw.index}".encode()).digest()[:16]
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(size)
    # 52 bits, so that 1 - u is never rounded to 0.
    uniform = ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return -np.log(-np.log(uniform))


def nucleus(scaled: Float[Tensor, "rows vocabulary"], top_p: float) -> Bool[Tensor, "rows vocabulary"]:
    """Return the smallest set of most likely tokens whose probabilities sum to at least `top_p`, and what is
    as likely as the last of them: logits in 16 bits are often equal, and two hosts must not choose among them
    by the order of a sort."""
    if top_p == 1:
        return torch.ones_like(scaled, dtype=torch.bool)
    probabilities, vocabulary = scaled.softmax(-1), scaled.shape[-1]
    for size in (*NUCLEUS_SIZES, vocabulary):
        ordered = probabilities.topk(min(size, vocabulary)).values
        inside = ordered.cumsum(-1) - ordered < top_p
        if size >= vocabulary or not inside[:, -1].any():
            return probabilities >= ordered.masked_fill(~inside, torch.inf).amin(-1, keepdim=True)
    raise AssertionError("the last size is the vocabulary's")
