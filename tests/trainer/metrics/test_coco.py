import contextlib
import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from shards.format import rle
from shards.format.dataset import Category
from shards.format.sample import Instance, Sample
from tests.trainer import tiny
from trainer.commands import train
from trainer.data.augment import scaled_size
from trainer.metrics.coco import SUMMARY, CocoMetric, CocoResult, Scores, ground_truth
from trainer.model import inference as detect_module
from trainer.model.build import build_model
from trainer.model.inference import Detections, detect

CATEGORIES = (Category(1, "Person", "/m/p"), Category(2, "Car", "/m/c"), Category(5, "Sign", "/m/s"))
SIZE = 200


def disc(x: float, y: float, w: float, h: float) -> NDArray[np.bool_]:
    """An ellipse that fills a box."""
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    return ((columns - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2 <= 1


def instance(
    category: int, box: tuple[float, float, float, float], *, mask: bool = True, group: bool = False
) -> Instance:
    return Instance(category, box, rle.encode(disc(*box)) if mask else None, is_group_of=group)


def sample(image_id: str, *instances: Instance) -> Sample:
    return Sample(image_id, b"", SIZE, SIZE, instances)


def detections(*found: tuple[int, tuple[float, float, float, float], float]) -> Detections:
    boxes = np.array([(x, y, x + w, y + h) for _, (x, y, w, h), _ in found], np.float32).reshape(-1, 4)
    labels, scores = np.array([c for c, _, _ in found], np.int64), np.array([s for _, _, s in found], np.float32)
    return Detections(boxes, labels, scores, tuple(rle.encode(disc(*box)) for _, box, _ in found))


def rate(*pairs: tuple[Sample, Detections]) -> CocoResult:
    metric = CocoMetric(CATEGORIES)
    for one, found in pairs:
        metric.process([one], [found])
    result = metric.evaluate()
    assert result is not None
    return result


def random_pairs(images: int = 25) -> list[tuple[Sample, Detections]]:
    """Objects of all sizes, groups, boxes without masks; detections near, far, doubled, of the wrong class."""
    rng = np.random.default_rng(3)
    pairs = []
    for number in range(images):
        objects, found = [], []
        for _ in range(int(rng.integers(0, 7))):
            side = rng.choice([20.0, 60.0, 120.0])
            x, y, w, h = (*rng.uniform(0, SIZE - side, 2), *(side * rng.uniform(0.6, 1.0, 2)))
            category = int(rng.choice([1, 2, 5]))
            objects.append(instance(category, (x, y, w, h), mask=rng.random() < 0.8, group=rng.random() < 0.1))
            for _ in range(int(rng.integers(0, 3))):
                dx, dy = rng.normal(0, 0.06 * side, 2)
                near = (x + dx, y + dy, w * rng.uniform(0.9, 1.1), h * rng.uniform(0.9, 1.1))
                found.append((category if rng.random() < 0.9 else 1, near, float(rng.random())))
        if rng.random() < 0.5:
            found.append((int(rng.choice([1, 2, 5])), (5.0, 5.0, 30.0, 30.0), float(rng.random())))
        pairs.append((sample(f"image{number:03d}", *objects), detections(*found)))
    return pairs


def by_pycocotools(
    task: str, pairs: list[tuple[Sample, Detections]], categories: Sequence[Category] = CATEGORIES
) -> NDArray[np.float64]:
    """The twelve numbers by COCO's own loader of results, all images at once."""
    truth: list[dict] = []
    found: list[dict] = []
    for number, (one, detected) in enumerate(pairs, start=1):
        for obj in one.instances:
            annotation = ground_truth("segm" if task == "segm" else "bbox", obj, one.height, one.width)
            if annotation is not None:
                truth.append({**annotation, "id": len(truth) + 1, "image_id": number})
        for obj, score in zip(detected.instances(), detected.scores):
            entry = {"image_id": number, "category_id": obj.category_id, "score": float(score)}
            assert obj.segmentation is not None
            entry |= {"bbox": list(obj.bbox)} if task == "bbox" else {"segmentation": obj.segmentation.to_coco()}
            found.append(entry)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "width": one.width, "height": one.height} for i, (one, _) in enumerate(pairs, start=1)],
        "categories": [{"id": c.id, "name": c.name} for c in categories],
        "annotations": truth,
        "info": {},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.asarray(evaluation.stats)


def numbers(scores: Scores) -> list[float]:
    return [-1.0 if getattr(scores, name) is None else getattr(scores, name) for name in SUMMARY]


def test_agrees_with_pycocotools_own_way_of_loading_results(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = random_pairs()
    result = rate(*pairs)
    assert numbers(result.bbox) == pytest.approx(by_pycocotools("bbox", pairs), abs=1e-9)
    assert numbers(result.segm) == pytest.approx(by_pycocotools("segm", pairs), abs=1e-9)
    assert 0.05 < (result.segm.ap or 0) < 0.95
    assert np.mean([c.ap for c in result.segm.classes]) == pytest.approx(result.segm.ap)
    assert np.mean([c.ap50 for c in result.bbox.classes]) == pytest.approx(result.bbox.ap50)
    assert capsys.readouterr().out == ""


def test_perfect_detections_and_none() -> None:
    box = (20.0, 30.0, 50.0, 60.0)
    one = sample("a", instance(1, box), instance(2, (100.0, 100.0, 20.0, 20.0)))
    perfect = rate((one, detections((1, box, 0.9), (2, (100.0, 100.0, 20.0, 20.0), 0.8))))
    assert (perfect.bbox.ap, perfect.segm.ap, perfect.bbox.ap_small) == pytest.approx((1, 1, 1))
    assert perfect.bbox.ap_large is None
    person, car, sign = perfect.segm.classes
    assert [c.name for c in (person, car, sign)] == ["Person", "Car", "Sign"]
    assert (person.ap, person.ap50, car.ap, car.ap50) == pytest.approx((1, 1, 1, 1))
    assert (sign.ap, sign.ap50) == (None, None)
    nothing = rate((one, detections()))
    assert (nothing.bbox.ap, nothing.segm.ap, nothing.detections) == (0, 0, 0)
    empty = rate((sample("a"), detections()))
    assert (empty.bbox.ap, empty.segm.ap, empty.images) == (None, None, 1)


def test_a_box_without_a_mask_counts_for_boxes_only() -> None:
    masked, unmasked = (20.0, 20.0, 50.0, 50.0), (100.0, 100.0, 50.0, 50.0)
    one = sample("a", instance(1, masked), instance(1, unmasked, mask=False))
    result = rate((one, detections((1, masked, 0.9))))
    assert (result.boxes, result.masks) == (2, 1)
    assert result.segm.ar100 == 1
    assert result.bbox.ar100 == 0.5


@pytest.mark.parametrize("mask", [True, False])
def test_detections_in_a_group_are_neither_right_nor_wrong(mask: bool) -> None:
    box, group = (10.0, 10.0, 40.0, 40.0), (80.0, 80.0, 110.0, 110.0)
    one = sample("a", instance(1, box), instance(1, group, mask=mask, group=True))
    inside = (1, (110.0, 110.0, 40.0, 40.0), 0.95)
    result = rate((one, detections(inside, (1, box, 0.9))))
    assert (result.bbox.ap, result.segm.ap) == pytest.approx((1, 1))
    assert (result.boxes, result.masks) == (1, 1)
    without = rate((sample("a", instance(1, box)), detections(inside, (1, box, 0.9))))
    assert (without.bbox.ap or 0) < 0.6
    assert (without.segm.ap or 0) < 0.6


def test_any_split_over_ranks_gives_the_same_and_an_image_twice_is_noticed() -> None:
    pairs = random_pairs(9)
    whole = rate(*pairs)
    ranks = [CocoMetric(CATEGORIES) for _ in range(3)]
    for number, (one, found) in enumerate(pairs):
        ranks[number % 3].process([one], [found])
    images = [image for metric in ranks for image in metric._images]
    assert ranks[0].evaluate(lambda own: images) == whole
    assert ranks[1].evaluate(lambda own: None) is None
    with pytest.raises(RuntimeError, match="1 images were processed more than once, such as image000"):
        ranks[0].evaluate(lambda own: [*images, images[0]])
    ranks[0].reset()
    empty = ranks[0].evaluate()
    assert empty is not None
    assert empty.images == 0


def test_detect_finds_what_torchvision_finds(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    config = train.parse(tiny.arguments(tiny.ROOT, tiny.ROOT))
    torch.manual_seed(0)
    network = build_model(config.model, config.data, 3).eval()
    images = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((90, 130), (64, 64))]
    with torch.no_grad():
        expected = network([image / 255 for image in images])
    # One mask at a time, and all at once.
    for limit in (1, 2**30):
        monkeypatch.setattr(detect_module, "PASTE_BYTES", limit)
        for ours, theirs in zip(detect(network, images, "cpu"), expected, strict=True):
            assert len(ours) > 5
            np.testing.assert_array_equal(ours.boxes, theirs["boxes"].numpy())
            np.testing.assert_array_equal(ours.labels, theirs["labels"].numpy())
            np.testing.assert_array_equal(ours.scores, theirs["scores"].numpy())
            masks = np.stack([rle.decode(mask) for mask in ours.masks])
            np.testing.assert_array_equal(masks, (theirs["masks"][:, 0] >= 0.5).numpy())
    with pytest.raises(RuntimeError, match="call eval"):
        detect(network.train(), images, "cpu")


@pytest.mark.parametrize("thin", [(3, 600), (600, 1), (5, 600), (1, 1)])
def test_a_thin_image_is_seen_at_the_size_that_training_gives_it(thin: tuple[int, int]) -> None:
    config = train.parse(tiny.arguments(tiny.ROOT, tiny.ROOT, model__score_threshold=0.0))
    torch.manual_seed(0)
    network = build_model(config.model, config.data, 3).eval()
    seen: list[tuple[int, int]] = []
    network.rpn.register_forward_pre_hook(lambda _, given: seen.extend(given[0].image_sizes))
    other = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    image = torch.randint(0, 256, (3, *thin), dtype=torch.uint8)
    found = detect(network, [image, other], "cpu")
    sizes = [scaled_size(*size, config.data.min_size, config.data.max_size) for size in (thin, (48, 64))]
    assert seen == sizes
    assert len(found[1]) > 0
    assert np.isfinite(found[0].boxes).all()
    assert all((mask.height, mask.width) == thin for mask in found[0].masks)
    assert (found[0].boxes <= np.array([thin[1], thin[0]] * 2)).all()


def test_an_image_without_detections() -> None:
    config = train.parse(tiny.arguments(tiny.ROOT, tiny.ROOT, model__score_threshold=1.0))
    network = build_model(config.model, config.data, 3).eval()
    (found,) = detect(network, [torch.zeros((3, 40, 50), dtype=torch.uint8)], "cpu")
    assert (len(found), found.boxes.shape, found.masks, found.instances()) == (0, (0, 4), (), [])
    assert replace(rate((sample("a"), found)), images=0).detections == 0
