"""The values of `train.layers`. Imports no torch."""

import re
from dataclasses import dataclass
from fractions import Fraction

from shards.common.errors import UserError

KNOWN = "heads, 5+, 4+, 3+, 2+, all, or a share such as 'last 10%'"
STEM_STAGE, LAST_STAGE = 1, 5


@dataclass(frozen=True)
class Part:
    """The trained part of the network: a share of its layers, or else the heads, and the backbone from a stage on.

    Attributes:
        stage: first trained stage of the backbone, 1 (all stages) to 6 (none).
        share: of the layers, counted from the output, above 0 and at most 1; None to go by `stage`.
    """

    stage: int = STEM_STAGE
    share: Fraction | None = None


def parse_layers(layers: str) -> Part:
    """Return the part of the network that `heads`, `4+`, `last 10%` or the like names; UserError for another value."""
    text = " ".join(layers.split())
    if text in ("heads", "all"):
        return Part(STEM_STAGE if text == "all" else LAST_STAGE + 1)
    if match := re.fullmatch(r"([2-5])\+", text):
        return Part(int(match[1]))
    if match := re.fullmatch(r"last (\d+(?:\.\d+)?) ?%", text):
        share = Fraction(match[1]) / 100
        if 0 < share <= 1:
            return Part(share=share)
    raise UserError(f"train.layers is {layers!r}: it must be {KNOWN}")
