import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as coco_mask

from shards.common.errors import SampleError
from shards.format import rle
from shards.format.sample import FLAGS, Instance, Sample, canonical_json
from tests.support import sample

masks = hnp.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20)), elements=st.integers(0, 1))


@given(masks, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_encode_part_encodes_the_whole_mask(part, left, top, right, bottom):
    whole = np.pad(part, ((top, bottom), (left, right)))
    assert rle.encode_part(part, left, top, *whole.shape) == rle.encode(whole)


@given(masks)
def test_rle_is_that_of_pycocotools_and_decodes_to_the_mask(mask):
    encoded = rle.encode(mask)
    assert coco_mask.encode(np.asfortranarray(mask))["counts"].decode() == encoded.counts
    assert np.array_equal(rle.decode(encoded), mask)
    assert rle.area(encoded) == mask.sum()
    runs = rle.runs(encoded)
    assert np.array_equal(np.repeat(np.arange(len(runs)) % 2, runs).reshape(mask.shape[::-1]).T, mask)
    assert rle.Rle.from_json(json.loads(json.dumps(encoded.to_json()))) == encoded


@given(
    st.builds(
        Instance,
        category_id=st.integers(1, 600),
        bbox=st.tuples(*[st.floats(0, 2000).map(lambda v: round(v, 3))] * 4),
        segmentation=st.none(),
        box_id=st.text(max_size=8),
        label=st.text(max_size=12),
        **dict.fromkeys(FLAGS, st.booleans()),
        predicted_iou=st.none() | st.floats(0, 1),
        area=st.none() | st.floats(0, 1e6),
    )
)
def test_any_instance_is_restored_from_json(instance):
    original = Sample("0a", b"\xff\xd8", 4000, 4000, (instance,), author='Ünï "quoted" \u2028')
    assert Sample.from_members("0a", original.to_members()) == original


def test_members_are_the_jpeg_untouched_and_coco_annotations():
    original = sample(1)
    members = original.to_members()
    assert list(members) == ["jpg", "json"]
    assert members["jpg"] == original.image
    person, car = json.loads(members["json"])["annotations"]
    mask = original.instances[0].segmentation
    assert mask is not None
    assert person["segmentation"] == mask.to_json()
    assert (car["segmentation"], car["iscrowd"]) == (None, 0)
    assert Instance(1, (0, 0, 5, 5), None, is_group_of=True).to_json()["iscrowd"] == 1


@pytest.mark.parametrize("key", ["", "a.b", "../x", "a/b", "a b", "x" * 65, "_a"])
def test_a_wrong_key_and_a_mask_of_another_size_than_the_image_are_refused(key):
    with pytest.raises(SampleError, match="can key a sample"):
        Sample(key, b"", 1, 1).to_members()
    wrong = Instance(1, (0, 0, 2, 2), rle.encode(np.ones((4, 4))), "box7")
    with pytest.raises(SampleError, match=r"box7: the mask is 4x4, the image 8x8"):
        Sample("0a", b"", 8, 8, (wrong,)).to_members()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *((None, whole) for whole in (b"", b"[]", b"{}", b'{"width":"x"}', b"\xff")),
        (b'"width":48', b'"width":1e999'),
        (b'"category_id":1', b'"category_id":1e999'),
        (b'"bbox":[6.0', b'"bbox":[' + b"9" * 400),
        (b'"annotations":', b'"a":' + b"[" * 100_000),
        (b'"title":"', b'"title":"\xe9'),
    ],
)
def test_json_in_another_format_is_one_short_line_with_shard_and_sample(old, new):
    damaged = new if old is None else sample(0).to_members()["json"].replace(old, new)
    with pytest.raises(SampleError, match=r"^t.tar: sample 0a: 0a.json is not in the shard format") as caught:
        Sample.from_members("0a", {"jpg": b"", "json": damaged}, where="t.tar")
    assert len(str(caught.value)) < 300
    with pytest.raises(SampleError, match=r"there is no 0a.json"):
        Sample.from_members("0a", {"jpg": b""})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"counts": "PP5"}, "annotation 0 \\(box b0\\): the RLE has runs of .* pixels, the image 1536"),
        ({"counts": "0" + rle.encode(np.ones((9, 9))).counts}, "the RLE has runs of 81 pixels"),
        ({"counts": "T2N0"}, "the RLE has runs of"),  # a negative run
        ({"counts": "zz!~"}, "the RLE cannot be decoded: not a compressed RLE"),
        ({"counts": "oooooooo1"}, "cannot be decoded: not a compressed RLE: a run of more than 32 bits"),
        ({"counts": "\xe9"}, "the RLE cannot be decoded"),
        ({"counts": ""}, "the RLE has runs of 0 pixels"),
        ({"size": [0, 0]}, "the RLE is of 0x0, the image 48x32"),
        ({"size": [2**31, 2**31]}, "the RLE is of 2147483648x2147483648, the image 48x32"),
        ({"bbox": [0, 0, float("nan"), 5]}, "bbox \\[0, 0, nan, 5\\] is not finite"),
        ({"bbox": [0, 0, 1e30, 5]}, "bbox .* leaves the image of 48x32"),
        ({"bbox": [9, 9, -5, 5]}, "bbox .* is empty"),
        ({"width": 0}, "0a.json says 0x32, not the size of an image"),
        ({"height": 2**31}, "0a.json says 48x2147483648, not the size of an image"),
    ],
)
def test_contents_that_native_code_would_not_survive_are_one_line_with_shard_and_sample(changes, reason):
    value = json.loads(sample(1).to_members()["json"])
    for key, new in changes.items():
        if key in ("counts", "size"):
            value["annotations"][0]["segmentation"][key] = new
        else:
            (value if key in value else value["annotations"][0])[key] = new
    with pytest.raises(SampleError, match=f"^t.tar: sample 0a: .*{reason}.*: build the dataset again$"):
        Sample.from_members("0a", {"jpg": b"", "json": json.dumps(value).encode()}, where="t.tar")


@given(st.lists(masks, min_size=1, max_size=5), st.data())
def test_masks_of_an_image_are_checked_together_as_one_by_one(parts, data):
    whole = [rle.encode(np.pad(part, ((0, 20 - part.shape[0]), (0, 20 - part.shape[1])))) for part in parts]
    assert rle.all_valid(whole, 20, 20)
    number = data.draw(st.integers(0, len(whole) - 1))
    text = data.draw(st.text("".join(map(chr, range(46, 114))), max_size=4))
    counts = whole[number].counts
    place = data.draw(st.integers(0, len(counts)))
    whole[number] = rle.Rle(20, 20, counts[:place] + text + counts[place + data.draw(st.integers(0, 3)) :])
    assert rle.all_valid(whole, 20, 20) == (not any(rle.fault(mask, 20, 20) for mask in whole))


def test_canonical_json_does_not_depend_on_the_order_of_keys():
    values = ({"b": np.int64(1), "a": "é"}, {"a": "é", "b": 1})
    assert [canonical_json(value) for value in values] == ['{"a":"é","b":1}'.encode()] * 2


def test_picture_and_masks_are_decoded_at_the_stored_size(monkeypatch):
    one = sample(1)
    picture, masks = one.picture(), one.masks()
    assert (picture.mode, picture.size) == ("RGB", (48, 32))
    assert masks.shape == (2, 32, 48)
    assert masks.dtype == np.bool_
    assert one.instances[0].segmentation == rle.encode(masks[0])
    assert not masks[1].any()  # a box without a mask
    assert Sample("a", b"", 4, 3).masks().shape == (0, 3, 4)
    assert repr(one) == f"Sample('{1:016x}', 48x32, 2 objects, 1 mask)"  # and no bytes
    for limit, data, reason in ((None, one.image[:200], ""), (None, b"GIF", "not a JPEG"), (500, one.image, "exceeds")):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(SampleError, match=f"sample a: a.jpg cannot be decoded: .*{reason}"):
            Sample("a", data, 48, 32).picture()
