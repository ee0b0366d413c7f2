"""Pictures of annotated images: translucent masks with outlines, boxes, names and scores.

Pillow and numpy only, no display: it serves notebooks, training runs and servers alike. `display_instances` and
`display_top_masks` have the names and arguments of matterport's Mask_RCNN.
"""

from __future__ import annotations

import colorsys
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from shards.drawing.label_placement import Colour, Labels, Rectangle
from shards.format import rle
from shards.format.dataset import Category
from shards.format.sample import Instance

# Far apart in hue, and bright enough to be seen on photographs.
PALETTE: tuple[Colour, ...] = (
    (255, 92, 72),
    (52, 152, 255),
    (255, 200, 40),
    (60, 205, 110),
    (205, 110, 255),
    (255, 140, 30),
    (40, 215, 215),
    (255, 115, 190),
    (170, 215, 50),
    (140, 140, 255),
)
GOLDEN_ANGLE = 0.381966  # hues of further classes: each falls into the widest gap that is left
LEGIBLE_SIDE = 640  # pixels; smaller pictures have no room for names
FILL = 0.40  # of the class's colour in a mask
HATCH = 0.32  # likewise on the lines through a group-of region
PANE_SIDE = 480  # pixels, the longer side of a picture among several
GAP = 8  # pixels between them


def class_colour(category_id: int) -> Colour:
    """The colour (R, G, B) of a class: the same in every picture, for any set of classes."""
    number = max(category_id, 1) - 1
    if number < len(PALETTE):
        return PALETTE[number]
    red, green, blue = colorsys.hsv_to_rgb((number * GOLDEN_ANGLE) % 1.0, 0.72, 0.98)
    return round(red * 255), round(green * 255), round(blue * 255)


def legible_scale(width: int, height: int) -> int:
    """The whole factor by which an image is best enlarged before names are drawn on it; 1 for most photographs."""
    return max(1, -(-LEGIBLE_SIDE // max(width, height, 1)) if max(width, height) < LEGIBLE_SIDE else 1)


def draw_instances(
    image: NDArray[np.uint8] | Image.Image,
    instances: Sequence[Instance],
    categories: Sequence[Category],
    *,
    scores: Sequence[float] | None = None,
    captions: Sequence[str] | None = None,
    colours: Sequence[Colour] | None = None,
    show_masks: bool = True,
    show_boxes: bool = True,
    scale: int = 1,
) -> Image.Image:
    """Draw annotations or detections on an image.

    A mask is filled and outlined. A box without a mask is dashed; a group-of region is hatched and its name says so.
    An object with no room for its name goes without where another of its class, whose colour it shares, has one.

    Args:
        image: uint8 (H, W, 3) RGB, (H, W) or (H, W, 1) grey, or a picture of Pillow's.
        instances: what to draw, in pixels of `image`.
        categories: the classes, for their names.
        scores: one an instance, shown beside its name.
        captions: one an instance, written in place of name and score.
        colours: one an instance (default: its class's, `class_colour`).
        show_masks, show_boxes: whether those are drawn; names always are.
        scale: the picture is enlarged by this whole factor (see `legible_scale`).

    Returns:
        An RGB picture of `scale` times the image's size. `image` is left as it was.

    Raises:
        ValueError: as many scores, captions, colours as instances are needed; a mask must have the image's size; the
            image is of another shape or dtype.
    """
    for name, values in (("scores", scores), ("captions", captions), ("colours", colours)):
        if values is not None and len(values) != len(instances):
            raise ValueError(f"{len(values)} {name} for {len(instances)} instances")
    if colours is None:
        colours = [class_colour(instance.category_id) for instance in instances]
    picture = _enlarged(image, scale)
    line = max(1, round(max(picture.size) / 400))
    # Large objects first, so that small ones in front of them stay visible.
    order = sorted(range(len(instances)), key=lambda i: -instances[i].bbox[2] * instances[i].bbox[3])
    pixels = np.array(picture)
    for i in order:
        if show_boxes if instances[i].segmentation is None else show_masks:
            _paint_area(pixels, instances[i], colours[i], scale, line)
    picture = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(picture)
    for i in order if show_boxes else ():
        _draw_box(canvas, instances[i], colours[i], scale, line)
    names = {category.id: category.name for category in categories}
    labels = Labels(canvas, picture.size)
    # The best detections, else the largest objects, get the best places for their names.
    for i in sorted(order, key=lambda i: -scores[i]) if scores is not None else order:
        instance = instances[i]
        text = names.get(instance.category_id, f"class {instance.category_id}")
        text += " (group)" if instance.is_group_of else ""
        text += f" {scores[i]:.2f}" if scores is not None else ""
        text = captions[i] if captions is not None else text
        labels.draw(text, colours[i], _corners(instance, scale, picture.size))
    return picture


def display_instances(
    image: NDArray[np.uint8] | Image.Image,
    boxes: NDArray[Any],
    masks: NDArray[Any],
    class_ids: NDArray[Any],
    class_names: Sequence[str],
    scores: NDArray[Any] | None = None,
    title: str = "",
    figsize: tuple[float, float] = (16, 16),
    ax: Any = None,
    show_mask: bool = True,
    show_bbox: bool = True,
    colors: Sequence[Sequence[float]] | None = None,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Draw instances as matterport's `visualize.display_instances` does, with the same arguments in the same order.

    https://github.com/matterport/Mask_RCNN/blob/master/mrcnn/visualize.py. Pillow is all it needs, no display.

    Args:
        image: uint8 (H, W, 3) RGB, (H, W) or (H, W, 1) grey, or a picture of Pillow's.
        boxes: (N, 4) y1, x1, y2, x2 in pixels, y2 and x2 just outside; an instance whose box is all 0 is left out.
        masks: (H, W, N); not 0 is the object.
        class_ids: (N,) indices of `class_names`, in which 0 is the background.
        class_names: a name a class.
        scores: (N,), or None.
        title: written above the picture.
        figsize: taken and not used: the picture has the image's size.
        ax: axes of matplotlib's to put the picture and its title into, or None.
        show_mask, show_bbox: whether those are drawn.
        colors: one an instance, R, G, B from 0 to 1.
        captions: one an instance, in place of name and score.

    Returns:
        An RGB picture. Without `ax`, a notebook shows it as well: end the last line of a cell with a semicolon, or it
        is shown twice.

    Raises:
        ValueError: an argument has a shape that does not go with the others', or a box is not finite.
    """
    picture, boxes, class_ids = _as_picture(image), _checked_boxes(boxes), np.asarray(class_ids)
    masks = _checked_masks("masks", masks, picture, len(boxes))
    one_a_box = {"class_ids": class_ids, "scores": scores, "colors": colors, "captions": captions}
    for name, values in one_a_box.items():
        if values is not None and len(values) != len(boxes):
            raise ValueError(f"{name} has a length of {len(values)}: it must be {len(boxes)}, one a box")
    kept = [i for i in range(len(boxes)) if np.any(boxes[i])]
    instances = []
    for i in kept:
        y1, x1, y2, x2 = map(float, boxes[i])
        instances.append(Instance(int(class_ids[i]), (x1, y1, x2 - x1, y2 - y1), rle.encode(masks[:, :, i])))
    picture = draw_instances(
        picture,
        instances,
        [Category(number, name, "") for number, name in enumerate(class_names)],
        scores=None if scores is None else [float(scores[i]) for i in kept],
        captions=None if captions is None else [str(captions[i]) for i in kept],
        colours=None if colors is None else [_colour_of_floats(colors[i]) for i in kept],
        show_masks=show_mask,
        show_boxes=show_bbox,
    )
    if ax is not None:
        ax.imshow(np.asarray(picture))
        ax.set_title(title)
        ax.axis("off")
        return picture
    return _shown(titled_picture(picture, title) if title else picture)


def display_top_masks(
    image: NDArray[np.uint8] | Image.Image,
    mask: NDArray[Any],
    class_ids: NDArray[Any],
    class_names: Sequence[str],
    limit: int = 4,
) -> Image.Image:
    """Draw an image and, beside it, the masks of the classes that cover most of it, one pane a class, largest first.

    As matterport's `visualize.display_top_masks`, with the same arguments.

    Args:
        image: uint8 (H, W, 3) RGB, (H, W) or (H, W, 1) grey, or a picture of Pillow's.
        mask: (H, W, N); not 0 is the object.
        class_ids: (N,) indices of `class_names`.
        class_names: a name a class.
        limit: panes beside the image; "-" stands above those that are left empty.

    Returns:
        An RGB picture of `limit` + 1 panes; shown as `display_instances` does.

    Raises:
        ValueError: `mask` must have the image's size and as many masks as there are class ids; `limit` is negative.
    """
    if limit < 0:
        raise ValueError(f"limit is {limit}: it must be 0 or more")
    picture, class_ids = _as_picture(image), np.asarray(class_ids)
    mask = _checked_masks("mask", mask, picture, len(class_ids)) != 0
    areas = {int(number): int(mask[:, :, class_ids == number].sum()) for number in np.unique(class_ids)}
    top = sorted((number for number in areas if areas[number]), key=lambda number: -areas[number])[:limit]
    panes = [titled_picture(_pane(picture), f"H x W = {picture.height} x {picture.width}")]
    for number in top:
        name = class_names[number] if 0 <= number < len(class_names) else f"class {number}"
        panes.append(titled_picture(_pane(_class_masks(mask[:, :, class_ids == number], class_colour(number))), name))
    panes += [titled_picture(Image.new("RGB", _pane(picture).size), "-") for _ in range(limit - len(top))]
    strip = Image.new("RGB", (sum(pane.width for pane in panes) + GAP * limit, panes[0].height), "white")
    left = 0
    for pane in panes:
        strip.paste(pane, (left, 0))
        left += pane.width + GAP
    return _shown(strip)


def _checked_boxes(boxes: NDArray[Any]) -> NDArray[np.float64]:
    """(N, 4) float64; ValueError where they are of another shape, or not finite."""
    checked = np.asarray(boxes, dtype=np.float64)
    checked = checked if checked.size else checked.reshape(0, 4)
    if checked.ndim != 2 or checked.shape[1] != 4:
        raise ValueError(f"boxes has the shape {checked.shape}: it must be (N, 4)")
    odd = np.flatnonzero(~np.isfinite(checked).all(axis=1))
    if len(odd):
        raise ValueError(f"boxes[{odd[0]}] is {checked[odd[0]].tolist()}: it must be finite")
    return checked


def _checked_masks(name: str, masks: NDArray[Any], picture: Image.Image, count: int) -> NDArray[Any]:
    """`count` masks as an array (H, W, count); ValueError where they are of another number, or not of the picture."""
    checked, shape = np.asarray(masks), (picture.height, picture.width, count)
    if not checked.size and not count:
        return np.zeros(shape, np.uint8)  # of any shape: a list without an entry, too
    if checked.shape != shape:
        raise ValueError(
            f"{name} has the shape {checked.shape}: it must be {shape}: H and W of the image, N of the rest"
        )
    return checked


def _class_masks(masks: NDArray[np.bool_], colour: Colour) -> Image.Image:
    """(H, W, n) masks of one class on black, each in a shade of its colour, later ones above and brighter."""
    pixels = np.zeros((*masks.shape[:2], 3), np.uint8)
    for i in range(masks.shape[-1]):
        share = 0.45 + 0.55 * (i + 1) / masks.shape[-1]
        pixels[masks[:, :, i]] = np.round(np.array(colour) * share).astype(np.uint8)
    return Image.fromarray(pixels)


def _pane(picture: Image.Image) -> Image.Image:
    scale = min(1.0, PANE_SIDE / max(picture.size))
    return picture.resize((max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)))


def titled_picture(picture: Image.Image, title: str) -> Image.Image:
    """A picture under a line of text, as much of it as there is room for."""
    font = ImageFont.load_default(size=16)
    titled = Image.new("RGB", (picture.width, picture.height + 26), "white")
    ImageDraw.Draw(titled).text((4, 3), title, fill="black", font=font)
    titled.paste(picture, (0, 26))
    return titled


def _colour_of_floats(colour: Sequence[float]) -> Colour:
    red, green, blue = (round(255 * float(value)) for value in colour)
    return red, green, blue


def _shown(picture: Image.Image) -> Image.Image:
    """The picture, once a notebook that we are in has shown it."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if getattr(shell, "kernel", None) is not None:
        ipython.display.display(picture)
    return picture


def _as_picture(image: NDArray[np.uint8] | Image.Image) -> Image.Image:
    """RGB; ValueError for an array that is no image of eight bits."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (1,), (3,), (4,)):
        raise ValueError(
            f"image has the shape {pixels.shape} and holds {pixels.dtype}: it must be (H, W, 3) or (H, W) of uint8, "
            "0 to 255"
        )
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels).convert("RGB")


def _enlarged(image: NDArray[np.uint8] | Image.Image, scale: int) -> Image.Image:
    picture = _as_picture(image)
    if scale == 1:
        return picture.copy()
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)


def _corners(instance: Instance, scale: int, size: tuple[int, int]) -> Rectangle:
    """Left, top, right, bottom (inclusive) of the box in the picture, clipped to it."""
    x, y, w, h = (value * scale for value in instance.bbox)
    left, top = min(max(round(x), 0), size[0] - 1), min(max(round(y), 0), size[1] - 1)
    right, bottom = min(max(round(x + w) - 1, left), size[0] - 1), min(max(round(y + h) - 1, top), size[1] - 1)
    return left, top, right, bottom


def _paint_area(pixels: NDArray[np.uint8], instance: Instance, colour: Colour, scale: int, line: int) -> None:
    """Fill and outline the mask, or hatch the region of a group; in place."""
    height, width = pixels.shape[:2]
    paint = np.array(colour, dtype=np.float32)
    if instance.segmentation is not None:
        mask = _enlarged_mask(rle.decode(instance.segmentation), scale)
        if mask.shape != (height, width):
            raise ValueError(f"a mask is {mask.shape[1]}x{mask.shape[0]}, the picture {width}x{height}")
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            return
        # Only the object's own rectangle is touched: a hundred masks on a large photograph stay quick.
        window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        inside = mask[window]
        _blend(pixels[window], inside, paint, FILL)
        _blend(pixels[window], inside & ~_eroded(inside, line), paint, 0.95)
    elif instance.is_group_of:
        left, top, right, bottom = _corners(instance, scale, (width, height))
        rows, columns = np.arange(top, bottom + 1)[:, None], np.arange(left, right + 1)[None, :]
        stripes = (rows + columns) % (8 * line) < 2 * line
        _blend(pixels[top : bottom + 1, left : right + 1], stripes, paint, HATCH)


def _enlarged_mask(mask: NDArray[np.uint8], scale: int) -> NDArray[np.bool_]:
    """Booleans of `scale` times the size, with smooth edges instead of steps."""
    if scale > 1:
        picture = Image.fromarray(mask * np.uint8(255))
        size = (picture.width * scale, picture.height * scale)
        mask = np.asarray(picture.resize(size, Image.Resampling.BILINEAR)) // 128
    return mask.astype(np.bool_)


def _blend(pixels: NDArray[np.uint8], where: NDArray[np.bool_], colour: NDArray[np.float32], share: float) -> None:
    pixels[where] = np.round(pixels[where] * (1 - share) + colour * share).astype(np.uint8)


def _eroded(mask: NDArray[np.bool_], steps: int) -> NDArray[np.bool_]:
    """What is left of a mask when its rim of `steps` pixels is taken off; outside the array counts as background."""
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def _draw_box(canvas: ImageDraw.ImageDraw, instance: Instance, colour: Colour, scale: int, line: int) -> None:
    left, top, right, bottom = _corners(instance, scale, canvas.im.size)
    if instance.segmentation is not None or instance.is_group_of:
        canvas.rectangle((left, top, right, bottom), outline=colour, width=line)
        return
    dash = 5 * line
    for x in range(left, right + 1, 2 * dash):
        end = min(x + dash - 1, right)
        canvas.rectangle((x, top, end, min(top + line - 1, bottom)), fill=colour)
        canvas.rectangle((x, max(bottom - line + 1, top), end, bottom), fill=colour)
    for y in range(top, bottom + 1, 2 * dash):
        end = min(y + dash - 1, bottom)
        canvas.rectangle((left, y, min(left + line - 1, right), end), fill=colour)
        canvas.rectangle((max(right - line + 1, left), y, right, end), fill=colour)
