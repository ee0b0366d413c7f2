import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from builder.packing.pack import pack_image
from builder.packing.picture_frame import Frame, frame_of
from builder.tasks.plan import Annotation, Failure, InlineMask, Metadata, PlannedImage, PlannedObject, StatedFile
from shards.format import rle
from shards.format.accounts import EXIF_IGNORED, TURNED, remarks

X, Y, W, H = 10, 60, 20, 30  # of the object in the upright picture of 60x100 pixels
POLYGON = f"[[{X},{Y},{X + W},{Y},{X + W},{Y + H},{X},{Y + H}]]"


def upright() -> Image.Image:
    pixels = np.zeros((100, 60, 3), np.uint8)
    pixels[Y : Y + H, X : X + W] = 255
    return Image.fromarray(pixels)


def stored_as(orientation: int, picture: Image.Image) -> bytes:
    """Return a JPEG that viewers show as `picture`: `exif_transpose` undone by the inverse operation."""
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    tags = picture.getexif()
    tags[0x0112] = inverse
    picture.info["exif"] = tags.tobytes()
    turned = ImageOps.exif_transpose(picture)
    tags[0x0112] = orientation
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", quality=95, exif=tags)
    return buffer.getvalue()


def planned(width: int, height: int) -> PlannedImage:
    box = (X / width, (X + W) / width, Y / height, (Y + H) / height)
    objects = (
        PlannedObject(Annotation(1, "thing", box, "annotations[0]", "7"), InlineMask(width, height, POLYGON)),
        PlannedObject(Annotation(2, "boxed", box), None),
    )
    return PlannedImage("a", "x", objects, (), (), Metadata(), StatedFile("a.jpg", width, height))


@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
def test_annotations_of_the_upright_picture_are_turned_to_the_stored_pixels(orientation: int) -> None:
    data = stored_as(orientation, upright())
    sample, accounts = pack_image(planned(60, 100), data, {}, "train")
    assert sample is not None
    bright = np.asarray(sample.picture())[..., 0] > 127
    masked, boxed = sample.instances
    assert masked.segmentation is not None
    assert (rle.decode(masked.segmentation) == bright).all()
    assert masked.bbox == boxed.bbox == rle.bounds(masked.segmentation)
    assert remarks(accounts) == ({TURNED: 1} if orientation > 1 else {})


def test_known_boxes_of_turned_pictures() -> None:
    found = {}
    for orientation in (6, 8):
        sample, _ = pack_image(planned(60, 100), stored_as(orientation, upright()), {}, "train")
        assert sample is not None
        found[orientation] = sample.instances[0].bbox
    assert found == {6: (60, 30, 30, 20), 8: (10, 10, 30, 20)}


def test_sizes_that_exif_does_not_explain_refuse_the_image() -> None:
    for orientation, size in ((1, (100, 60)), (3, (100, 60)), (6, (61, 70)), (1, (101, 100))):
        sample, accounts = pack_image(planned(*size), stored_as(orientation, upright()), {}, "train")
        assert sample is None
        assert [account.status for account in accounts] == ["image-shape", "image-failed"]
        assert f"for {size[0]}x{size[1]} pixels" in accounts[0].detail
    nearly_square = Image.new("RGB", (100, 101))  # both sizes could be one picture: the swapped sides are too exact
    data = stored_as(1, nearly_square)
    assert isinstance(frame_of(data, (100, 101), StatedFile("a.jpg", 101, 100)), Failure)
    assert frame_of(data, (100, 101), StatedFile("a.jpg", 200, 201)) == Frame(100, 101, scale=100 * 101 / (200 * 201))


def test_orientations_that_do_not_change_the_size_are_remarked() -> None:
    for orientation, picture in ((2, upright()), (3, upright()), (4, upright()), (6, Image.new("RGB", (50, 50)))):
        data, stated = stored_as(orientation, picture), StatedFile("a.jpg", *picture.size)
        assert frame_of(data, picture.size, stated) == Frame(*picture.size, note=EXIF_IGNORED)
        assert frame_of(data, picture.size, None) == Frame(*picture.size)  # Open Images annotates stored pixels
    turned = stored_as(6, upright())
    assert frame_of(turned, (100, 60), StatedFile("a.jpg", 100, 60)) == Frame(100, 60)
    assert frame_of(turned, (100, 60), StatedFile("a.jpg", 50, 30)) == Frame(100, 60, scale=4.0)
