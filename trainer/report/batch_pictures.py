"""A picture of the first training batches as the network sees them: augmented, with what is taught about them."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from shards.drawing.contact_sheet import Size, fit_rows, join_rows
from shards.drawing.overlay import draw_instances, titled_picture
from shards.format import rle
from shards.format.dataset import Category
from shards.format.sample import Instance
from shards.storage.location import Location
from trainer.config.settings import LossConfig
from trainer.data.instances import PREDICTED, Batch
from trainer.report.pictures import encode_jpeg
from trainer.step.ground_truth import ground_truth_of

FILE = "batches.jpg"
IMAGES = 16  # of the first steps
WIDTH, HEIGHT = 1600, 400  # pixels of the picture, and about of a row


class BatchPictures:
    """Draws the first images of a run's main rank: `batches.jpg` is written after the first step and when it is full.

    A run that resumes at a `step` keeps the picture that it has; one from another run's checkpoint has none yet.
    """

    def __init__(self, run: Location, categories: Sequence[Category], loss: LossConfig, step: int = 0) -> None:
        self.run, self.categories, self.loss = run, categories, loss
        self._batches, self._missing = list[Batch](), 0 if step and (run / FILE).exists() else IMAGES

    def add(self, batches: Sequence[Batch]) -> None:
        """Add the batches of a step, on any device, unless the picture has all its images."""
        if self._missing <= 0:
            return
        is_first = not self._batches
        self._batches += [batch.to("cpu") for batch in batches]
        self._missing -= sum(map(len, batches))
        if is_first or self._missing <= 0:  # drawing takes up to half a second, for which other ranks wait
            (self.run / FILE).write(encode_jpeg(draw_batches(self._batches, self.categories, self.loss), 85))
        if self._missing <= 0:
            self._batches.clear()  # of large images


def draw_batches(batches: Sequence[Batch], categories: Sequence[Category], loss: LossConfig) -> Image.Image:
    """Draw the first images of batches on the CPU, with masks rebuilt from bitmaps; ignored regions are hatched."""
    images = [(batch, i) for batch in batches for i in range(len(batch))][:IMAGES]
    sizes = [(int(batch.sizes[i, 1]), int(batch.sizes[i, 0])) for batch, i in images]
    rows = fit_rows(sizes, WIDTH, HEIGHT)
    left = iter(images)
    return join_rows([[_draw_image(*next(left), size, categories, loss) for size in row] for row in rows])


def _draw_image(batch: Batch, i: int, size: Size, categories: Sequence[Category], loss: LossConfig) -> Image.Image:
    """Draw image `i` of a batch, without its padding, at a size."""
    height, width = batch.sizes[i].tolist()
    pixels = batch.images[i, :, :height, :width].permute(1, 2, 0).numpy()  # [H, W, 3]
    picture = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BILINEAR)
    factors = torch.tensor([size[0] / width, size[1] / height] * 2)
    truth, instances, captions = ground_truth_of(batch, loss), list[Instance](), list[str]()
    names = {category.id: category.name for category in categories}
    for row in torch.nonzero(truth.is_object[i] | truth.is_region[i]).flatten().tolist():
        x0, y0, x1, y1 = (batch.boxes[i, row] * factors).tolist()
        label, is_region = int(batch.labels[i, row]), bool(truth.is_region[i, row])
        mask = None
        if truth.has_mask[i, row] and not is_region:
            mask = rle.encode(rebuild_mask(batch.bitmaps[i, row], batch.frames[i, row] * factors, size))
        instances.append(Instance(label, (x0, y0, x1 - x0, y1 - y0), mask, is_group_of=is_region))
        name = names.get(label, f"class {label}")
        is_predicted = mask is not None and batch.flags[i, row] & PREDICTED
        captions.append(f"{name} (ignored)" if is_region else f"{name} (predicted)" if is_predicted else name)
    return titled_picture(draw_instances(picture, instances, categories, captions=captions), batch.image_ids[i])


def rebuild_mask(bitmap: Tensor, frame: Tensor, size: Size) -> NDArray[np.bool_]:
    """Return the mask, bool [H, W] of a picture of `size`, of a bitmap in its frame x0, y0, x1, y1 in pixels of it."""
    x0, y0, x1, y1 = frame.tolist()
    side = len(bitmap)
    across, down = side / (x1 - x0), side / (y1 - y0)  # cells per pixel
    cells = Image.fromarray(bitmap.numpy())
    affine = (across, 0, -x0 * across, 0, down, -y0 * down)
    return np.asarray(cells.transform(size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)) >= 128
