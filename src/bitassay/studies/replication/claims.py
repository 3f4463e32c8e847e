"""What theory and the layer-replication proposal predict of copies (`claims.py` says how it is judged).

"As good as" is KL within 10 % of the other's. The sections are those of the proposal, `-` what it does not
say.
"""

import math

from bitassay.quantization.recipe.recipe import BASE
from bitassay.studies.claims import LESS, MORE, Claim, divergence, perplexity

ALIKE = (-0.1, 0.1)
NO_WORSE = (-math.inf, 0.1)
KL, SHARE = "nats of KL", "%"

CLAIMS = (
    Claim(
        "control-table",
        "4.3.4",
        "copies of all layers (Simple) bring a 2-bit model nearer to the base than each layer once",
        "the basic method, to be validated",
        LESS,
        (divergence("Simple-2bit", "Simple-2bit-single"),),
        KL,
    ),
    Claim(
        "control-table",
        "4.3.4",
        "rotated, selective copies (Rotated) are the best 2-bit configuration",
        "best of its rows",
        LESS,
        tuple(divergence("Rotated-2bit", other) for other in ("Simple-2bit", "Selective-2bit")),
        KL,
    ),
    Claim(
        "control-table",
        "4.1.2",
        "a 2-bit model with copies is acceptable: perplexity grows by less than 2",
        "below 2",
        (-math.inf, 2.0),
        tuple(perplexity(name, "Baseline") for name in ("Selective-2bit", "Rotated-2bit")),
        "perplexity",
    ),
    Claim(
        "phase1",
        "-",
        "serial copies of the same codes leave the trained map: they are worse than each layer once",
        "the same error, added coherently",
        MORE,
        (
            *(divergence(f"serial-{n}", "w2") for n in (2, 3, 4)),
            *(divergence(f"serial-{n}-gptq", "w2-gptq") for n in (2, 3, 4)),
        ),
        KL,
    ),
    Claim(
        "phase1",
        "-",
        "damped, further copies do less harm than plain",
        "-",
        LESS,
        (
            *(divergence(f"damped-{n}", f"serial-{n}") for n in (2, 3)),
            *(divergence(f"damped-{n}-gptq", f"serial-{n}-gptq") for n in (2, 3, 4)),
        ),
        KL,
    ),
    Claim(
        "phase1",
        "-",
        "a damped copy of a single layer changes perplexity by less than half a per cent",
        "within half a per cent",
        (-0.005, 0.005),
        (
            perplexity("damped-layer-2-gptq", "w2-gptq", fraction=True),
            perplexity("damped-layer-2-dense", BASE, fraction=True),
        ),
        SHARE,
    ),
    Claim(
        "phase1",
        "4.3.2",
        "further passes with fitted coefficients repair something: better than each layer once",
        "at least as good on the text that they are fitted to",
        LESS,
        tuple(divergence(f"fitted-{n}-gptq", "w2-gptq") for n in (2, 3)),
        KL,
    ),
    Claim(
        "phase1",
        "-",
        "the repair is the further pass's, not the rescaling's: better than each layer once, rescaled",
        "-",
        LESS,
        tuple(divergence(f"fitted-{n}-gptq", "fitted-2-gptq-rescaled") for n in (2, 3)),
        KL,
    ),
    Claim(
        "phase2",
        "4.4.3",
        "n grids moved by i/n are one grid of step 1/n: two of 2 bits are as good as 3 bits, four as 4 bits",
        "the error falls by n squared",
        ALIKE,
        (divergence("offset-2", "w3", fraction=True), divergence("offset-4", "w4", fraction=True)),
        SHARE,
    ),
    Claim(
        "phase2",
        "-",
        "residual codes are better than offset grids of as many stored bits",
        "19.3 dB beside 13.3",
        LESS,
        (divergence("residual-2-meshed", "offset-2"), divergence("residual-2", "offset-2")),
        KL,
    ),
    Claim(
        "phase2",
        "-",
        "two 2-bit planes that mesh are as good as plain 4 bits in groups of the same size",
        "the full 4-bit quality",
        NO_WORSE,
        (divergence("residual-2-meshed", "w4", fraction=True),),
        SHARE,
    ),
    Claim(
        "phase2",
        "-",
        "no averaged copies beat one matrix of as many stored bits",
        "the controls win",
        MORE,
        tuple(divergence(name, "w4-g32") for name in ("scale-2", "clip-2", "offset-2", "noise-2", "seed-2")),
        KL,
    ),
    Claim(
        "phase2",
        "4.4.3",
        "offset grids repair more than copies that differ by scale, clipping, noise or seed",
        "complementary grids",
        LESS,
        tuple(divergence("offset-2", name) for name in ("scale-2", "clip-2", "noise-2", "seed-2")),
        KL,
    ),
    Claim(
        "phase3",
        "4.3.2",
        "which layers have copies matters: those chosen by KL beat as many chosen by massive activations",
        "-",
        LESS,
        (divergence("residual-kl", "residual-massive"),),
        KL,
    ),
    *(
        Claim(
            "phase3",
            "4.3.2",
            f"layers chosen by {what} beat as many first and as many last ones",
            "-",
            LESS,
            tuple(divergence(f"residual-{by}", f"residual-{end}") for end in ("first", "last")),
            KL,
        )
        for by, what in (("error", "weight error"), ("kl", "KL"))
    ),
    Claim(
        "phase3",
        "4.3.3",
        "rotation first makes copies better",
        "they complement each other",
        LESS,
        (
            divergence("residual-kl-rotated", "residual-kl"),
            divergence("residual-listed-rotated", "residual-listed"),
            divergence("w2-gptq-rotated", "w2-gptq"),
        ),
        KL,
    ),
    Claim(
        "phase3",
        "4.3.3",
        "copies rotated each by itself are better than one matrix once",
        "-",
        LESS,
        (divergence("rotations-2", "w2"),),
        KL,
    ),
    Claim(
        "phase4",
        "4.1.1",
        "with copies, 1 bit is acceptable: perplexity grows by less than 10",
        "below 10",
        (-math.inf, 10.0),
        (perplexity("residual-w1-4", BASE), perplexity("residual-w1-3-rotated", BASE)),
        "perplexity",
    ),
    Claim(
        "uses",
        "-",
        "n passes over moved 4-bit input grids reach log2 n more bits: four are as good as 6 bits",
        "log2 n",
        NO_WORSE,
        (
            divergence("w16a4-grids-4", "w16a6", fraction=True),
            divergence("w2a4-grids-4", "w2a6", fraction=True),
        ),
        SHARE,
    ),
    Claim(
        "uses",
        "-",
        "averaging two input grids is better than one",
        "one more bit",
        LESS,
        (divergence("w16a4-grids-2", "w16a4"), divergence("w2a4-grids-2", "w2a4")),
        KL,
    ),
    Claim(
        "uses",
        "4.3.2",
        "stopping where nothing changes costs no quality",
        "passes saved, quality kept",
        NO_WORSE,
        (divergence("stopping-3-gptq", "again-3-gptq", fraction=True),),
        SHARE,
    ),
    Claim(
        "planes",
        "-",
        "both planes are as good as plain 4 bits",
        "the full 4-bit quality",
        NO_WORSE,
        (divergence("both", "uniform-4", fraction=True),),
        SHARE,
    ),
    Claim(
        "planes",
        "-",
        "the two digits of a 4-bit grid are as good as plain 4 bits",
        "the full 4-bit quality",
        NO_WORSE,
        (divergence("digits", "uniform-4", fraction=True),),
        SHARE,
    ),
    Claim(
        "planes",
        "-",
        "plane 1 of two that mesh is as good as a 2-bit model made for itself",
        "8.3 beside 9.2 dB",
        NO_WORSE,
        (divergence("plane-1", "uniform-2", fraction=True),),
        SHARE,
    ),
    Claim(
        "planes",
        "-",
        "an entropy gate chooses well: better than as many tokens at random",
        "-",
        LESS,
        tuple(divergence(f"gated-{theta}", f"random-{theta}") for theta in ("1", "2.5", "4")),
        KL,
    ),
    Claim(
        "planes",
        "-",
        "read to the bottom in chosen layers, a checkpoint is as good as mixed bits of that average",
        "-",
        NO_WORSE,
        tuple(
            divergence(f"layers-{share}", f"mixed-{bits}", fraction=True)
            for share, bits in (("20%", "2.7"), ("40%", "3.15"), ("60%", "3.6"), ("80%", "4.05"))
        ),
        SHARE,
    ),
)
