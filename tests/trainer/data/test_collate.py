"""`TrainCollate`, `EvalCollate` and image decoding."""

from __future__ import annotations

import io
import random
import struct
import zlib
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from shards.common.errors import SampleError
from shards.format import rle
from shards.format.dataset import open_dataset
from shards.format.sample import Instance, MaskPrediction, Sample
from shards.stream.loader import loader
from shards.stream.streams import ShardStream
from trainer.config.settings import DataConfig
from trainer.data.collate import IMAGE_FORMATS, EvalCollate, TrainCollate, decode_image
from trainer.data.instances import GROUP_OF, HAS_MASK, IGNORED, PREDICTED, Batch
from trainer.data.mask_bitmaps import BITMAP


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth picture, which JPEG keeps well, uint8 [H, W, 3]."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: np.ndarray, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def sample(name: str, height: int = 60, width: int = 80, objects: int = 2, seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    instances = []
    for i in range(objects):
        mask = np.zeros((height, width), np.uint8)
        y, x = int(rng.integers(0, height - 20)), int(rng.integers(0, width - 20))
        mask[y : y + 16, x : x + 12] = 1
        instances.append(Instance(i + 1, (x, y, 12, 16), rle.encode(mask)))
    instances.append(Instance(1, (5, 5, 30, 30), None, is_group_of=True))
    return Sample(name, encoded(pixels(height, width, seed)), width, height, tuple(instances))


CONFIG = DataConfig(min_size=96, max_size=128)


def parts(batch: Batch, i: int) -> list[torch.Tensor]:
    """The pixels and columns of image i of a batch."""
    height, width = batch.sizes[i].tolist()
    columns = (batch.boxes, batch.labels, batch.flags, batch.bitmaps, batch.frames)
    return [batch.images[i, :, :height, :width], *(column[i, : counts(batch)[i]] for column in columns)]


def counts(batch: Batch) -> list[int]:
    """The number of annotations of each image."""
    return (batch.labels > 0).sum(1).tolist()


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batch_has_the_documented_shapes_and_dtypes():
    batch = TrainCollate(CONFIG, 0, 6)([sample("a"), sample("b", 90, 60, 0), sample("c", 64, 64, 3)], 0)
    assert (batch.images.shape, batch.images.dtype) == ((3, 3, 128, 128), torch.uint8)
    assert batch.sizes.tolist() == [[96, 128], [128, 85], [96, 96]]
    assert counts(batch) == [3, 1, 4]
    assert batch.image_ids == ("a", "b", "c")
    assert [row[row > 0].tolist() for row in batch.labels] == [[1, 2, 1], [1], [1, 2, 3, 1]]
    assert batch.flags[2].tolist() == [HAS_MASK, HAS_MASK, HAS_MASK, GROUP_OF, 0, 0, 0, 0]
    assert batch.boxes.dtype == batch.frames.dtype == torch.float32
    assert batch.sizes.dtype == batch.labels.dtype == torch.int64
    assert batch.bitmaps.shape == (3, 8, BITMAP, BITMAP)


def test_predicted_masks_are_flagged_or_with_predictions_off_not_there():
    one, other = sample("a"), sample("b", seed=1)
    first, *others = one.instances
    filled = replace(one, instances=(replace(first, prediction=MaskPrediction(0.9, "run")), *others))
    data = replace(CONFIG, copy_paste=1.0, rotate=20.0)
    flags, expected = (TrainCollate(CONFIG, 0, 6)([some], 0).flags[0].tolist() for some in (filled, one))
    assert flags == [HAS_MASK | PREDICTED, *expected[1:]]
    found = TrainCollate(data, 0, 6, predictions=False)([other, filled], 0)
    boxes = TrainCollate(data, 0, 6)([other, filled.without_predictions()], 0)
    assert all(equal(parts(found, i), parts(boxes, i)) for i in (0, 1))
    assert not all(equal(parts(TrainCollate(data, 0, 6)([other, filled], 0), i), parts(boxes, i)) for i in (0, 1))


def test_shortest_pads_to_the_largest_image_and_chooses_a_min_size():
    collate = TrainCollate(DataConfig(min_size=96, max_size=200, resize="shortest"), 0, 6)
    assert collate([sample("a"), sample("b", 64, 64)], 0).images.shape == (2, 3, 96, 128)
    collate = TrainCollate(DataConfig(min_sizes=[48, 64], max_size=200, resize="shortest"), 0, 6)
    assert {collate([sample("a")], epoch).sizes.min().item() for epoch in range(10)} == {48, 64}


def test_oriented_pads_to_one_of_two_shapes_and_a_mixed_batch_to_the_square():
    collate = TrainCollate(DataConfig(min_size=64, max_size=90, resize="oriented"), 0, 6)
    wide, tall = sample("a"), sample("b", 80, 60)
    shapes = [tuple(collate(samples, 0).images.shape[-2:]) for samples in ([wide], [tall], [wide, tall])]
    assert shapes == [(64, 96), (96, 64), (96, 96)]


@pytest.mark.parametrize("resize", ["square", "shortest"])
def test_a_sample_is_augmented_alike_at_any_place_and_in_a_loader_process(resize):
    samples = [sample("a"), sample("b", 90, 60, 0, seed=1), sample("c", 64, 64, 3, seed=2), sample("d", seed=3)]
    collate = TrainCollate(DataConfig(min_size=96, max_size=128, resize=resize), 3, 6)
    here = collate(samples, 5)
    backwards: Any = samples[::-1]
    [there] = DataLoader(backwards, batch_size=4, num_workers=1, collate_fn=lambda batch: collate(batch, 5))
    assert there.images.is_shared()
    assert torch.equal(there.images.flip(0), here.images)
    assert all(equal(parts(there, 3 - i), parts(here, i)) for i in range(4))


def test_flips_follow_seed_and_epoch():
    one = sample("a")
    upright, mirrored = (
        TrainCollate(DataConfig(min_size=96, max_size=128, flip=flip), 0, 6)([one], 0) for flip in (0, 1)
    )
    assert torch.equal(mirrored.images[..., :96, :128], upright.images[..., :96, :128].flip(-1))
    assert torch.allclose(mirrored.boxes[0, :3, 0], 128 - upright.boxes[0, :3, 2])
    flips = {
        seed: tuple(
            torch.equal(TrainCollate(CONFIG, seed, 6)([one], epoch).images, mirrored.images) for epoch in range(10)
        )
        for seed in range(4)
    }
    assert all(set(of_seed) == {True, False} for of_seed in flips.values())
    assert len(set(flips.values())) > 1


def test_all_augmentations_together_are_reproducible_and_keep_shapes():
    config = DataConfig(
        batch_size=4,
        min_size=96,
        max_size=128,
        resize="scale_jitter",
        max_instances=3,
        rotate=20,
        shear=5,
        translate=0.1,
        iou_crop=0.5,
        photometric=0.5,
        mosaic=0.5,
        copy_paste=1.0,
    )
    samples = [sample("a", objects=6, seed=1), sample("b", 90, 60, 0, seed=2), sample("c", 64, 64, 3, seed=3)]
    samples.append(sample("d", 50, 60, 2, seed=4))
    batches = [TrainCollate(config, 0, 7)(samples, epoch) for epoch in (0, 0, 1, 2, 3, 4, 5)]
    assert equal(parts(batches[0], 0), parts(batches[1], 0))
    assert not equal(parts(batches[0], 0), parts(batches[2], 0))
    for batch in batches:
        assert batch.images.shape == (4, 3, 128, 128)
        objects = (batch.flags & (IGNORED | GROUP_OF)) == 0
        assert int((objects & (batch.labels > 0)).sum(1).max()) <= config.max_instances
        assert bool((batch.boxes[..., 2:] > batch.boxes[..., :2]).all())
        assert bool((batch.boxes >= 0).all())
        assert bool((batch.boxes[..., 2:] <= batch.sizes.flip(1)[:, None]).all())
    # The second image has only a group-of region of its own: the rest is pasted.
    assert max(counts(batch)[1] for batch in batches) > 1


def test_boxes_with_less_than_a_pixel_inside_the_image_are_dropped():
    boxes = [(10, 10, 0.3, 20), (79.7, 10, 5, 5), (10, 10, 20, 20), (-5, 3, 5.1, 8)]
    one = sample("a")
    narrow = replace(one, instances=tuple(Instance(i + 1, box, None) for i, box in enumerate(boxes)))
    batch = TrainCollate(CONFIG, 0, 6)([narrow, replace(one, instances=())], 0)
    assert [row[row > 0].tolist() for row in batch.labels] == [[3], []]


def test_verified_classes_are_the_lists_and_the_classes_with_a_box():
    one = sample("a")  # boxes of the classes 1 and 2
    samples = [
        replace(one, verified_present=(1,), verified_absent=(5,)),
        replace(one, verified_absent=(4,), instances=()),
        one,
    ]
    verified = TrainCollate(CONFIG, 0, 6)(samples, 0).verified
    assert [torch.where(row)[0].tolist() for [row] in verified] == [[0, 1, 2, 5], [0, 4], [0, 1, 2, 3, 4, 5]]


def test_the_tiles_of_a_mosaic_have_the_verified_classes_of_their_images():
    samples = [replace(sample(name, objects=0), instances=(), verified_absent=(i,)) for i, name in enumerate("abcd", 1)]
    batch = TrainCollate(replace(CONFIG, mosaic=1.0), 0, 6)(samples, 0)
    assert [[torch.where(tile)[0].tolist() for tile in row] for row in batch.verified] == [
        [[0, 1 + (i + k) % 4] for k in range(4)] for i in range(4)
    ]
    corner = batch.tiles[:, 0, 2:]
    assert torch.equal(batch.tiles[:, 3], torch.cat((corner, batch.sizes.flip(1)), dim=1))
    without = TrainCollate(replace(CONFIG, mosaic=1e-9), 0, 6)(samples, 0)
    assert without.verified.any(1).sum(1).tolist() == [2] * 4
    assert torch.equal(without.tiles[..., 2:], without.sizes.flip(1)[:, None].expand(-1, 4, -1))


def test_batches_of_mosaics_depend_on_neither_workers_nor_ranks_nor_a_resume(dataset: Path) -> None:
    config = replace(CONFIG, mosaic=0.7, iou_crop=0.5, rotate=20.0, copy_paste=0.5)

    def batches(count: int, workers: int = 0, **options: Any) -> list[Batch]:
        collate = TrainCollate(config, 0, 3)
        stream = ShardStream(open_dataset(dataset), "train", batch_size=4, lanes=2, collate=collate, **options)
        return list(islice(loader(stream, workers=workers), count))

    whole = batches(8)  # the second epoch begins within
    others = {
        "workers": batches(8, 2),
        "resumed": whole[:3] + batches(5, 1, start=3),
        "ranks": [batch for pair in zip(*(batches(4, rank=rank, world=2) for rank in (0, 1))) for batch in pair],
    }
    assert sum(len(tiles.unique(dim=0)) > 1 for batch in whole for tiles in batch.tiles) > 8
    for name, found in others.items():
        for batch, expected in zip(found, whole, strict=True):
            for item in fields(Batch):
                value, wanted = getattr(batch, item.name), getattr(expected, item.name)
                is_same = torch.equal(value, wanted) if isinstance(value, torch.Tensor) else value == wanted
                assert is_same, (name, item.name)


def test_eval_collate_returns_the_stored_image_and_drops_its_bytes():
    one = sample("a")
    batch = EvalCollate(6)([one], 0)
    assert torch.equal(batch.images[0], decode_image(one.image))
    assert batch.samples == [replace(one, image=b"")]


def test_pin_memory_copies_the_images_of_an_eval_batch(monkeypatch: pytest.MonkeyPatch):
    batch = EvalCollate(6)([sample("a"), sample("b")], 0)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda image: image + 1)  # there may be no GPU
    pinned = batch.pin_memory()
    assert pinned.samples == batch.samples
    assert all(torch.equal(*pair) for pair in zip(pinned.images, [image + 1 for image in batch.images], strict=True))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "JPEG"), ("RGB", "PNG"), ("RGB", "WEBP"), ("L", "JPEG"), ("P", "PNG"), ("CMYK", "JPEG"), ("RGBA", "PNG")],
)
def test_decode_image_converts_every_mode_to_rgb(mode, kind):
    image, file = Image.fromarray(pixels(40, 50)).convert(mode), io.BytesIO()
    image.save(file, kind)
    decoded = decode_image(file.getvalue(), IMAGE_FORMATS)
    assert (decoded.shape, decoded.dtype) == ((3, 40, 50), torch.uint8)
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(decoded.permute(1, 2, 0).numpy() - expected).mean() < 5


def by_pillow(data: bytes) -> np.ndarray | None:
    """The pixels of a JPEG, uint8 [H, W, 3]; None if Pillow does not decode it."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        return None


def damaged(data: bytes, kind: str, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    if kind == "bit":
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    return {"whole": data, "cut": data[:at], "longer": data + data[:at], "gap": data[:at] + data[at + 9 :]}[kind]


@pytest.mark.parametrize("kind", ["whole", "bit", "cut", "longer", "gap"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_has_the_pixels_of_pillow_whatever_its_coding_and_damage(mode, kind):
    image, rng = Image.fromarray(pixels(45, 67)).convert(mode), random.Random(0)
    coding: tuple[dict[str, Any], ...] = (
        {},
        {"subsampling": 0},
        {"subsampling": 1},
        {"progressive": True},
        {"restart_marker_rows": 1},
    )
    for options in coding:
        file = io.BytesIO()
        image.save(file, "JPEG", **options)
        for _ in range(1 if kind == "whole" else 20):
            one = damaged(file.getvalue(), kind, rng)
            wanted = by_pillow(one)
            if wanted is None:
                with pytest.raises(SampleError, match="cannot be decoded"):
                    decode_image(one)
            else:
                assert np.array_equal(decode_image(one).permute(1, 2, 0).numpy(), wanted)


def test_decode_image_keeps_the_upper_eight_bits_of_16_bit_colours():
    image = pixels(40, 50)
    raw = b"".join(b"\0" + row.tobytes() for row in (image.astype(">u2") * 257).reshape(40, -1))
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", struct.pack(">IIBBBBB", 50, 40, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(raw))):
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    assert np.array_equal(decode_image(data, IMAGE_FORMATS).permute(1, 2, 0).numpy(), image)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_decode_image_keeps_the_upper_eight_bits_of_16_bit_grey(kind):
    grey = pixels(40, 50)[:, :, 0]
    rng = np.random.default_rng(0)
    stored = grey.astype(np.uint16) * 256 + rng.integers(0, 256, grey.shape, dtype=np.uint16)
    decoded = decode_image(encoded(stored, kind), IMAGE_FORMATS)
    assert decoded.dtype == torch.uint8
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), np.stack([grey] * 3, axis=2))
    if kind == "TIFF":  # big-endian
        assert torch.equal(decode_image(encoded(stored.astype(">u2"), kind), IMAGE_FORMATS), decoded)


def test_decode_image_ignores_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees for display
    image = pixels(40, 50)
    assert torch.equal(
        decode_image(encoded(image, exif=exif), IMAGE_FORMATS), decode_image(encoded(image), IMAGE_FORMATS)
    )


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_decode_image_refuses_32_bit_numbers(kind):
    data = encoded(pixels(4, 5)[:, :, 0].astype(kind), "TIFF")
    with pytest.raises(SampleError, match=r"^an image of \d+ bytes .*: it has 32-bit .*: save it with 8 bits[^\n]*$"):
        decode_image(data, IMAGE_FORMATS)


def test_decode_image_opens_no_other_format_than_those_asked_for():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"  # Pillow starts Ghostscript
    png = encoded(pixels(4, 5), "PNG")
    for data, formats, wanted in ((eps, IMAGE_FORMATS, "one of JPEG, PNG, "), (png, ("JPEG",), "a JPEG")):
        with pytest.raises(SampleError, match=f"cannot be decoded: not {wanted}"):
            decode_image(data, formats)


def test_whatever_pillow_raises_is_an_image_that_cannot_be_decoded(monkeypatch):
    for error in (RuntimeError("decode"), AttributeError("x"), struct.error("y"), AssertionError()):
        monkeypatch.setattr(Image, "open", Mock(side_effect=error))
        with pytest.raises(SampleError, match=f"cannot be decoded: {error or 'AssertionError'}"):
            decode_image(b"")


@pytest.mark.parametrize("collate", [TrainCollate(CONFIG, 0, 6), EvalCollate(6)])
def test_a_class_that_the_dataset_does_not_have_is_a_sample_error(collate):
    one = sample("abc")
    for changes in ({"verified_absent": (6,)}, {"instances": (replace(one.instances[0], category_id=-1),)}):
        with pytest.raises(SampleError, match=r"sample abc: category id (6|-1) is not one of 1 to 5: build"):
            collate([replace(one, **changes)], 0)


@pytest.mark.parametrize("cut", [0, 10, 300, -40])
def test_a_broken_image_is_a_sample_error_with_its_key(cut):
    whole = sample("abc123", 200, 200)
    broken = Sample("abc123", whole.image[:cut], 200, 200)
    with pytest.raises(SampleError, match=r"abc123.*cannot be decoded"):
        TrainCollate(CONFIG, 0, 6)([broken], 0)


def test_an_image_of_another_size_than_annotated_is_a_sample_error():
    with pytest.raises(SampleError, match=r"abc.*80x60.*for 81x60"):
        EvalCollate(6)([Sample("abc", encoded(pixels(60, 80)), 81, 60)], 0)
