"""`PerImageMetric`: images of several ranks."""

from typing import Any

import pytest

from tests.trainer.metrics import test_coco, test_openimages
from trainer.metrics.coco import CocoMetric
from trainer.metrics.openimages import OpenImagesMetric
from trainer.metrics.overlaps import Comparison

CASES: list[Any] = [
    (CocoMetric, test_coco.CATEGORIES, test_coco.random_pairs(9)),
    (OpenImagesMetric, test_openimages.CATEGORIES, test_openimages.random_pairs(5, 12)),
]


@pytest.mark.parametrize(("metric_class", "categories", "pairs"), CASES)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluate_does_not_depend_on_the_number_of_ranks(
    world: int, metric_class: Any, categories: Any, pairs: Any
) -> None:
    images = [Comparison(*pair) for pair in pairs]
    whole = metric_class(categories)
    whole.process(images)
    ranks = [metric_class(categories) for _ in range(world)]
    for rank, metric in enumerate(ranks):
        metric.process(images[rank::world])
    gathered: list[Any] = []
    for metric in ranks:
        assert metric.evaluate(lambda own: gathered.extend(own)) is None
    assert ranks[0].evaluate(lambda own: gathered) == whole.evaluate()


@pytest.mark.parametrize(("metric_class", "categories", "pairs"), CASES)
def test_an_image_processed_twice_is_an_error_and_reset_forgets_it(
    metric_class: Any, categories: Any, pairs: Any
) -> None:
    images = [Comparison(*pair) for pair in pairs]
    metric = metric_class(categories)
    metric.process([*images, images[0]])
    with pytest.raises(RuntimeError, match=f"1 images were processed more than once, such as {pairs[0][0].image_id}"):
        metric.evaluate()
    metric.reset()
    assert metric.evaluate().images == 0
