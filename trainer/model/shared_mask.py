"""A mask head that predicts one mask per RoI, whatever its class."""

from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn


class SharedMask(nn.Conv2d):
    """The last layer of a mask head, 1 x 1, with one output that it repeats for every class.

    What it learns from the masks of some classes serves the others too, which have no masks. Its `state_dict` holds the
    one row once for every class, so that a checkpoint loads into torchvision's Mask R-CNN, with the same detections.
    Of rows that differ, as another Mask R-CNN has them, it takes the mean over the classes without the background.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(channels, 1, kernel_size=1)
        self.classes = classes
        self.register_state_dict_post_hook(_repeat_rows)
        self.register_load_state_dict_pre_hook(_join_rows)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits, [K, classes, M, M], of features [K, channels, M, M]; those of all classes share memory."""
        return super().forward(features).expand(-1, self.classes, -1, -1)


def _repeat_rows(module: SharedMask, state: MutableMapping[str, Tensor], prefix: str, _: Mapping[str, Any]) -> None:
    for name in ("weight", "bias"):
        row = state[prefix + name]
        state[prefix + name] = row.repeat(module.classes, *[1] * (row.dim() - 1))


def _join_rows(module: SharedMask, state: MutableMapping[str, Tensor], prefix: str, *_: Any) -> None:
    for name in ("weight", "bias"):
        rows = state.get(prefix + name)
        if rows is not None and len(rows) == module.classes > 1:
            first = rows[1:2]
            state[prefix + name] = first if (rows[1:] == first).all() else rows[1:].mean(dim=0, keepdim=True)
