"""The picture that annotations were made for, compared with the pixels that are stored.

Annotation tools show a picture turned as its EXIF orientation says, so that annotations can be of a picture whose sides
are swapped. Shards hold annotations of the pixels as stored.

Format: https://www.cipa.jp/std/documents/e/DC-008-2012_E.pdf (4.6.4, tag 0x0112).
"""

from dataclasses import dataclass

from builder.packing.images import same_shape
from builder.tasks.plan import Box, Failure, Size, StatedFile
from shards.format import rle
from shards.format.accounts import EXIF_IGNORED, TURNED
from shards.format.image import as_stored, exif_orientation

AS_STORED = 1
# Orientations that swap the sides. To be upright, the stored pixels are: transposed; turned clockwise; transposed along
# the other diagonal; turned counter-clockwise.
SWAPPING = (5, 6, 7, 8)


@dataclass(frozen=True)
class Frame:
    """An image as stored, in pixels, and the EXIF orientation in which its annotations see it.

    Attributes:
        scale: stored pixels, by area, per pixel of the annotated picture, which may have been of another size.
        note: the remark on it for the image's account; "" without one.
    """

    width: int
    height: int
    orientation: int = AS_STORED
    note: str = ""
    scale: float = 1.0

    @property
    def annotated(self) -> Size:
        """The (width, height) of the image as its annotations see it."""
        return (self.height, self.width) if self.orientation in SWAPPING else (self.width, self.height)

    def stored_box(self, box: Box) -> Box:
        """Return a box (x1, x2, y1, y2), in fractions of the annotated picture, in fractions of the stored one."""
        x1, x2, y1, y2 = box
        return {
            2: (1 - x2, 1 - x1, y1, y2),
            3: (1 - x2, 1 - x1, 1 - y2, 1 - y1),
            4: (x1, x2, 1 - y2, 1 - y1),
            5: (y1, y2, x1, x2),
            6: (y1, y2, 1 - x2, 1 - x1),
            7: (1 - y2, 1 - y1, 1 - x2, 1 - x1),
            8: (1 - y2, 1 - y1, x1, x2),
        }.get(self.orientation, box)

    def stored_mask(self, mask: rle.Rle) -> rle.Rle:
        """Return a mask of the annotated picture as one of the stored picture."""
        if self.orientation == AS_STORED:
            return mask
        return rle.encode(as_stored(rle.decode(mask), self.orientation))


def frame_of(data: bytes, size: Size, stated: StatedFile | None) -> Frame | Failure:
    """Compare the size of an image, (width, height) as stored, with the size that its annotations state.

    They may be two sizes of one picture. If the sides are swapped, its EXIF orientation has to explain it.
    Annotations that state no size are in fractions of the upright picture (of Open Images, without `stated`: of the
    stored one).
    """
    if stated is None:
        return Frame(*size)
    if stated.width is None or stated.height is None:
        orientation = exif_orientation(data)
        return Frame(*size, orientation, "" if orientation == AS_STORED else TURNED)
    wanted, swapped = (stated.width, stated.height), (size[1], size[0])
    orientation = exif_orientation(data)
    # Two nearly square sizes can be of one shape either way: then equal numbers decide.
    as_stored = wanted == size or (wanted != swapped and same_shape(wanted, size))
    scale = size[0] * size[1] / (wanted[0] * wanted[1])
    if not as_stored and orientation in SWAPPING and same_shape(wanted, swapped):
        return Frame(*size, orientation, TURNED, scale)
    if not as_stored:
        found = "x".join(map(str, size))
        return Failure(
            "image-shape",
            f"the annotations are for {wanted[0]}x{wanted[1]} pixels, the image has {found}, its EXIF orientation is "
            f"{orientation}",
        )
    is_square = same_shape(size, swapped)
    doubtful = orientation != AS_STORED and (orientation not in SWAPPING or is_square)
    return Frame(*size, note=EXIF_IGNORED if doubtful else "", scale=scale)
