"""Annotated images: translucent masks with outlines, boxes, names and scores, drawn with Pillow and numpy.

`display_instances` and `display_top_masks` have the names and arguments of matterport's `visualize`:
https://github.com/matterport/Mask_RCNN/blob/master/mrcnn/visualize.py. Neither needs a display.
"""

import colorsys
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from shards.drawing.label_placement import Colour, Labels, Rectangle, without_accents
from shards.format import rle
from shards.format.dataset import Category
from shards.format.sample import Instance

# Any two differ by at least 20 in CIEDE2000, also for readers who do not see red (protanopia) or green (deuteranopia).
# They were found by a random search; saturated ones come first.
PALETTE: list[Colour] = [
    ImageColor.getrgb(f"#{name}")[:3]
    for name in (
        *("078cff", "fffe00", "844c00", "d19100", "0000fd", "6da9b1"),
        *("a47b6c", "befeff", "7d5970", "d3d5ac", "58065e", "4c2524"),
    )
]
# What became of objects and detections, by colours of Okabe and Ito's palette, which differ for all readers.
FOUND, MISSED, SUPERFLUOUS, UNCOUNTED = (0, 140, 230), (240, 228, 66), (213, 94, 0), (170, 170, 170)
GOLDEN_ANGLE = 0.381966  # of a turn; puts the hue of each further class into the widest gap
LEGIBLE_SIDE = 640  # pixels; smaller images have no room for names
FILL_OPACITY = 0.40  # of masks
OUTLINE_OPACITY = 0.95
HATCH_OPACITY = 0.32  # of the stripes in group-of regions
DASH = 5  # lengths of dashes and gaps, in widths of the line
PANE_SIDE = 480  # pixels, the longer side of a pane of `display_top_masks`
GAP = 8  # pixels between panes
TITLE_HEIGHT = 26  # pixels

ImageLike = NDArray[np.uint8] | Image.Image


def class_colour(category_id: int) -> Colour:
    """Return the colour (R, G, B) of a class, which is the same in every picture and for any set of classes."""
    number = max(category_id, 1) - 1
    if number < len(PALETTE):
        return PALETTE[number]
    red, green, blue = colorsys.hsv_to_rgb((number * GOLDEN_ANGLE) % 1.0, 0.72, 0.98)
    return round(red * 255), round(green * 255), round(blue * 255)


def hex_colour(category_id: int) -> str:
    """Return the colour of a class as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*class_colour(category_id))


def legible_scale(width: int, height: int) -> int:
    """Return the integer factor by which an image is best enlarged to draw names on it; 1 for most photographs."""
    return -(-LEGIBLE_SIDE // max(width, height, 1))


def fitted_size(width: int, height: int, side: int) -> tuple[int, int]:
    """Scale a width and height in pixels so that the longer one is `side`; neither becomes 0."""
    scale = side / max(width, height)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def draw_instances(
    image: ImageLike,
    instances: Sequence[Instance],
    categories: Sequence[Category],
    *,
    scores: Sequence[float] | None = None,
    captions: Sequence[str] | None = None,
    colours: Sequence[Colour] | None = None,
    show_masks: bool = True,
    show_boxes: bool = True,
    scale: int = 1,
    text_scale: float = 1.0,
) -> Image.Image:
    """Draw annotations or detections on a copy of an image, in RGB and `scale` times its size.

    Masks are filled and outlined, predicted ones with dashes; boxes without a mask of the source are dashed, and
    group-of regions are hatched. An object without room for its name has none if another object of its class and colour
    is named.

    Args:
        image: uint8 [H, W, 3] RGB, [H, W] or [H, W, 1] grey, or a Pillow image.
        instances: the objects, in pixels of `image`.
        categories: the classes, for their names.
        scores, captions: one per instance, shown after its name, or instead of name and score (of a predicted mask,
            too).
        colours: one per instance; by default those of the classes.
        show_masks, show_boxes: whether masks, or boxes and group-of regions, are drawn; names always are.
        scale: integer factor by which the image is enlarged (see `legible_scale`).
        text_scale: factor of the size of names, for pictures that are shown small.

    Raises:
        ValueError: the length, shape or dtype of an argument does not match the others.
    """
    _check_lengths(len(instances), scores=scores, captions=captions, colours=colours)
    colours = colours or [class_colour(instance.category_id) for instance in instances]
    picture = _as_picture(image)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
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
    labels = Labels(canvas, picture.size, text_scale)
    # The best detections, else the largest objects, get the best places for their names.
    for i in order if scores is None else sorted(order, key=lambda i: -scores[i]):
        number = instances[i].category_id
        text = names.get(number, f"class {number}") + (" (group)" if instances[i].is_group_of else "")
        prediction = instances[i].prediction
        text += "" if prediction is None else f" predicted {prediction.score:.2f}"
        text += "" if scores is None else f" {scores[i]:.2f}"
        text = text if captions is None else captions[i]
        labels.draw(text, colours[i], _corners(instances[i], scale, picture.size), number)
    return picture


def display_instances(
    image: ImageLike,
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
    """Draw instances, with the arguments of matterport's `visualize.display_instances`.

    Args:
        image, scores, show_mask, show_bbox, captions: as for `draw_instances`.
        boxes: [N, 4] y1, x1, y2, x2 in pixels, y2 and x2 exclusive; instances whose box is all 0 are left out.
        masks: [H, W, N], nonzero in the object.
        class_ids: [N] indices of `class_names`, in which 0 is the background.
        class_names: one name per class.
        title: text above the picture.
        figsize: ignored; the picture has the size of the image.
        ax: matplotlib axes to draw the picture and its title into.
        colors: one per instance: R, G, B from 0 to 1.

    Returns:
        An RGB image. Without `ax`, a notebook displays it: end a cell with a semicolon, or it is displayed twice.

    Raises:
        ValueError: the shape of an argument does not match the others, or a box is not finite.
    """
    picture, boxes = _as_picture(image), _checked_boxes(boxes)
    masks = _checked_masks("masks", masks, picture, len(boxes))
    _check_lengths(len(boxes), class_ids=class_ids, scores=scores, colors=colors, captions=captions)
    kept = np.flatnonzero(boxes.any(axis=1)).tolist()
    xywh = np.column_stack((boxes[:, 1::-1], boxes[:, 3:1:-1] - boxes[:, 1::-1]))  # [N, 4]
    picture = draw_instances(
        picture,
        [Instance(int(class_ids[i]), tuple(xywh[i].tolist()), rle.encode(masks[:, :, i])) for i in kept],
        [Category(number, name, "") for number, name in enumerate(class_names)],
        scores=None if scores is None else [float(scores[i]) for i in kept],
        captions=None if captions is None else [str(captions[i]) for i in kept],
        colours=None if colors is None else [_colour_of_floats(colors[i]) for i in kept],
        show_masks=show_mask,
        show_boxes=show_bbox,
    )
    if ax is None:
        return _displayed(titled_picture(picture, title) if title else picture)
    ax.imshow(np.asarray(picture))
    ax.set_title(title)
    ax.axis("off")
    return picture


def display_top_masks(
    image: ImageLike, mask: NDArray[Any], class_ids: NDArray[Any], class_names: Sequence[str], limit: int = 4
) -> Image.Image:
    """Draw an image and next to it the masks of the classes with the largest area, one pane per class.

    The arguments are those of matterport's `visualize.display_top_masks`; image, result and errors are as for
    `display_instances`. `limit` is the number of panes next to the image, of which empty ones have the title "-".
    """
    if limit < 0:
        raise ValueError(f"limit is {limit}: it must be 0 or more")
    picture, class_ids = _as_picture(image), np.asarray(class_ids)
    mask = _checked_masks("mask", mask, picture, len(class_ids)) != 0
    areas = {int(number): int(mask[:, :, class_ids == number].sum()) for number in np.unique(class_ids)}
    top = sorted((number for number in areas if areas[number]), key=lambda number: -areas[number])[:limit]
    panes = [(f"H x W = {picture.height} x {picture.width}", picture)]
    for number in top:
        name = class_names[number] if 0 <= number < len(class_names) else f"class {number}"
        panes.append((name, _class_masks(mask[:, :, class_ids == number], class_colour(number))))
    panes += [("-", Image.new("RGB", picture.size))] * (limit - len(top))
    width, height = fitted_size(*picture.size, min(PANE_SIDE, max(picture.size)))
    strip = Image.new("RGB", (width * len(panes) + GAP * limit, height + TITLE_HEIGHT), "white")
    for number, (title, pane) in enumerate(panes):
        strip.paste(titled_picture(pane.resize((width, height)), title), (number * (width + GAP), 0))
    return _displayed(strip)


def titled_picture(picture: Image.Image, title: str) -> Image.Image:
    """Add a line of text above a picture, cut off at its width."""
    titled = Image.new("RGB", (picture.width, picture.height + TITLE_HEIGHT), "white")
    ImageDraw.Draw(titled).text((4, 3), without_accents(title), fill="black", font=ImageFont.load_default(size=16))
    titled.paste(picture, (0, TITLE_HEIGHT))
    return titled


def _check_lengths(count: int, **arguments: Sequence[Any] | NDArray[Any] | None) -> None:
    for name, values in arguments.items():
        if values is not None and len(values) != count:
            raise ValueError(f"{name} has a length of {len(values)}: it must be {count}, one per instance")


def _checked_boxes(boxes: NDArray[Any]) -> NDArray[np.float64]:
    """Return boxes as float64 [N, 4]; ValueError for another shape, or values that are not finite."""
    checked = np.asarray(boxes, dtype=np.float64)
    checked = checked if checked.size else checked.reshape(0, 4)
    if checked.ndim != 2 or checked.shape[1] != 4:
        raise ValueError(f"boxes has the shape {checked.shape}: it must be (N, 4)")
    infinite = np.flatnonzero(~np.isfinite(checked).all(axis=1))
    if len(infinite):
        raise ValueError(f"boxes[{infinite[0]}] is {checked[infinite[0]].tolist()}: it must be finite")
    return checked


def _checked_masks(name: str, masks: NDArray[Any], picture: Image.Image, count: int) -> NDArray[Any]:
    """Return masks as an array [H, W, count]; ValueError for another shape."""
    checked, shape = np.asarray(masks), (picture.height, picture.width, count)
    if not checked.size and not count:
        return np.zeros(shape, np.uint8)  # no masks, of any shape: an empty list as well
    if checked.shape != shape:
        given = f"{name} has the shape {checked.shape}"
        raise ValueError(f"{given}: it must be {shape}: H and W of the image, N of the other arguments")
    return checked


def _as_picture(image: ImageLike) -> Image.Image:
    """Convert an image to RGB; ValueError for an array of another shape or dtype."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (1,), (3,), (4,)):
        given = f"image has the shape {pixels.shape} and dtype {pixels.dtype}"
        raise ValueError(f"{given}: it must be (H, W, 3) or (H, W) of uint8, 0 to 255")
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels).convert("RGB")


def _class_masks(masks: NDArray[np.bool_], colour: Colour) -> Image.Image:
    """Paint the masks [H, W, n] of one class on black, later ones brighter and in front."""
    pixels = np.zeros((*masks.shape[:2], 3), np.uint8)
    for i in range(masks.shape[-1]):
        share = 0.45 + 0.55 * (i + 1) / masks.shape[-1]
        pixels[masks[:, :, i]] = np.round(np.array(colour) * share).astype(np.uint8)
    return Image.fromarray(pixels)


def _colour_of_floats(colour: Sequence[float]) -> Colour:
    red, green, blue = (round(255 * float(value)) for value in colour)
    return red, green, blue


def _displayed(picture: Image.Image) -> Image.Image:
    """Return the picture after displaying it if this is a notebook."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if getattr(shell, "kernel", None) is not None:
        ipython.display.display(picture)
    return picture


def _corners(instance: Instance, scale: int, size: tuple[int, int]) -> Rectangle:
    """Return left, top, right, bottom (inclusive) of the box in the picture, clipped to it."""
    x, y, w, h = (value * scale for value in instance.bbox)
    left, top = min(max(round(x), 0), size[0] - 1), min(max(round(y), 0), size[1] - 1)
    right, bottom = min(max(round(x + w) - 1, left), size[0] - 1), min(max(round(y + h) - 1, top), size[1] - 1)
    return left, top, right, bottom


def _paint_area(pixels: NDArray[np.uint8], instance: Instance, colour: Colour, scale: int, line: int) -> None:
    """Fill and outline the mask, or hatch the group-of region, in place; `pixels` is [H, W, 3]."""
    height, width = pixels.shape[:2]
    if instance.segmentation is not None:
        mask = _enlarged_mask(rle.decode(instance.segmentation), scale)
        if mask.shape != (height, width):
            raise ValueError(f"a mask is {mask.shape[1]}x{mask.shape[0]}, the picture {width}x{height}")
        # Only the object's own rectangle is computed, which keeps many masks on a large photograph fast.
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            return
        window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        inside = mask[window]
        _blend(pixels[window], inside, colour, FILL_OPACITY)
        rim = inside & ~_eroded(inside, line)
        rim = rim if instance.prediction is None else rim & _dashes(rim.shape, DASH * line)
        _blend(pixels[window], rim, colour, OUTLINE_OPACITY)
    elif instance.is_group_of:
        left, top, right, bottom = _corners(instance, scale, (width, height))
        rows, columns = np.arange(top, bottom + 1)[:, None], np.arange(left, right + 1)[None, :]
        stripes = (rows + columns) % (8 * line) < 2 * line
        _blend(pixels[top : bottom + 1, left : right + 1], stripes, colour, HATCH_OPACITY)


def _enlarged_mask(mask: NDArray[np.uint8], scale: int) -> NDArray[np.bool_]:
    """Enlarge a mask with smooth edges instead of steps."""
    if scale > 1:
        picture = Image.fromarray(mask * np.uint8(255))
        size = (picture.width * scale, picture.height * scale)
        mask = np.asarray(picture.resize(size, Image.Resampling.BILINEAR)) // 128
    return mask.astype(np.bool_)


def _blend(pixels: NDArray[np.uint8], where: NDArray[np.bool_], colour: Colour, opacity: float) -> None:
    paint = np.array(colour, np.float32) * opacity
    pixels[where] = np.round(pixels[where] * (1 - opacity) + paint).astype(np.uint8)


def _eroded(mask: NDArray[np.bool_], steps: int) -> NDArray[np.bool_]:
    """Remove a rim of `steps` pixels from a mask; outside the array is background."""
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def _dashes(shape: tuple[int, ...], dash: int) -> NDArray[np.bool_]:
    """Return where lines are drawn that are dashed in every direction: bool [H, W] of that shape."""
    rows, columns = np.arange(shape[0])[:, None], np.arange(shape[1])[None, :]
    # Of other lengths across than down: otherwise a line at 45 degrees would be solid.
    return np.asarray((rows // dash + columns // (dash + dash // 2)) % 2 == 0)


def _draw_box(canvas: ImageDraw.ImageDraw, instance: Instance, colour: Colour, scale: int, line: int) -> None:
    """Draw the outline of the box, dashed if the object has neither a mask of the source nor is a group.

    A predicted mask may fill its box: a solid box would hide the dashes of its outline.
    """
    left, top, right, bottom = _corners(instance, scale, canvas.im.size)
    if instance.source_mask is not None or instance.is_group_of:
        canvas.rectangle((left, top, right, bottom), outline=colour, width=line)
        return
    dash = DASH * line
    for x in range(left, right + 1, 2 * dash):
        end = min(x + dash - 1, right)
        canvas.rectangle((x, top, end, min(top + line - 1, bottom)), fill=colour)
        canvas.rectangle((x, max(bottom - line + 1, top), end, bottom), fill=colour)
    for y in range(top, bottom + 1, 2 * dash):
        end = min(y + dash - 1, bottom)
        canvas.rectangle((left, y, min(left + line - 1, right), end), fill=colour)
        canvas.rectangle((max(right - line + 1, left), y, right, end), fill=colour)
