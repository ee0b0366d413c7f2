"""`PerImageMetric`: images of several ranks."""

from typing import Any

import pytest

from tests.trainer.metrics.scenes import CATEGORIES, random_pairs
from trainer.metrics.coco import CocoMetric
from trainer.metrics.openimages import OpenImagesMetric
from trainer.metrics.overlaps import EvaluatedImage

PAIRS = random_pairs(5, 12)
IMAGES = [EvaluatedImage(*pair) for pair in PAIRS]


@pytest.mark.parametrize("metric_class", [CocoMetric, OpenImagesMetric])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluate_does_not_depend_on_the_number_of_ranks(world: int, metric_class: Any) -> None:
    whole = metric_class(CATEGORIES)
    whole.process(IMAGES)
    ranks = [metric_class(CATEGORIES) for _ in range(world)]
    for rank, metric in enumerate(ranks):
        metric.process(IMAGES[rank::world])
    gathered: list[Any] = []
    for metric in ranks:
        assert metric.evaluate(lambda own: gathered.extend(own)) is None
    assert ranks[0].evaluate(lambda own: gathered) == whole.evaluate()


@pytest.mark.parametrize("metric_class", [CocoMetric, OpenImagesMetric])
def test_an_image_processed_twice_is_an_error(metric_class: Any) -> None:
    metric = metric_class(CATEGORIES)
    metric.process([*IMAGES, IMAGES[0]])
    with pytest.raises(RuntimeError, match=f"1 images were processed more than once, such as {PAIRS[0][0].image_id}"):
        metric.evaluate()
