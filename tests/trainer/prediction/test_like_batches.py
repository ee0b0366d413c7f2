"""Batches of images of one shape: what is in them, how long an image waits, and what is found in it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.trainer.model.test_inference import random_network
from trainer.model.detection import padded_size, sizes_of
from trainer.model.inference import detect
from trainer.prediction import like_batches
from trainer.prediction.like_batches import detect_in_order


class Picture(NamedTuple):
    pixels: torch.Tensor


def pictures(*sizes: tuple[int, int]) -> list[Picture]:
    generator = torch.Generator().manual_seed(0)
    return [Picture(torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)) for size in sizes]


WIDE, TALL, LARGE = (60, 90), (90, 60), (120, 180)  # the first and the last have one shape for the network


def test_a_batch_has_one_shape_and_no_image_waits_for_long() -> None:
    network = random_network()
    images = pictures(TALL, *[WIDE, LARGE] * 12, TALL)
    batches = list(like_batches.like_batches(network, images, 2))
    assert sorted(number for batch in batches for number in batch.numbers) == list(range(26))
    for batch in batches:
        assert len({padded_size(network, sizes_of(network, [image])) for image in batch.images}) == 1
        assert [images[number] for number in batch.numbers] == batch.items
    assert [batch.numbers for batch in batches[:5]] == [[1, 2], [3, 4], [5, 6], [7, 8], [0]]
    assert batches[-1].numbers == [25]


def test_pixels_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(like_batches, "MOST_BYTES", 3 * 60 * 90 * 3)
    taken = 0

    def counted() -> Iterator[Picture]:
        nonlocal taken
        for image in pictures(TALL, *[WIDE] * 20):
            taken += 1
            yield image

    batches = like_batches.like_batches(random_network(), counted(), 100)
    assert next(batches).numbers == [0]
    assert taken == 4


def test_detections_come_in_order_and_do_not_depend_on_the_batch() -> None:
    network = random_network(score_threshold=0.3)
    images = pictures(WIDE, TALL, LARGE, WIDE, TALL, (64, 300), WIDE)
    found = list(detect_in_order(network, images, torch.device("cpu"), 3))
    assert [item for item, _ in found] == images
    for item, detections in found:
        [alone] = detect(network, [item.pixels], "cpu")
        assert len(detections) == len(alone) > 0
        np.testing.assert_array_equal(detections.labels, alone.labels)
        np.testing.assert_allclose(detections.boxes, alone.boxes, atol=1e-3)
        np.testing.assert_allclose(detections.scores, alone.scores, atol=1e-5)
