"""`Dataset.to_torchvision`, compared with torchvision's own wrapper of COCO files, and in loader processes."""

import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection import maskrcnn_resnet50_fpn

import maskstream
from shards.export.cli import main
from shards.format.dataset import Dataset, open_dataset
from tests.builder.builds import samples_of
from tests.support import run_examples

KEYS = {"boxes", "labels", "masks", "image_id", "area", "iscrowd"}


def pairs(batch: list[Any]) -> list[Any]:
    return batch


def test_items_are_those_of_torchvisions_wrapper(scenes: Dataset, out: Path) -> None:
    assert main([str(scenes.root), "--to", "coco", "--out", str(out), "--masks-only"]) == 0
    files = CocoDetection(str(out / "train"), str(out / "annotations" / "instances_train.json"))
    reference = wrap_dataset_for_transforms_v2(files, target_keys=KEYS)
    dataset = scenes.to_torchvision("train", keep_groups=True)
    assert len(dataset) == len(reference) == 8
    for row, (expected_image, expected) in enumerate(reference):
        image, target = dataset[row]
        assert (np.asarray(image) == np.asarray(expected_image)).all()
        assert target["image_id"] == expected["image_id"]
        if len(expected) == 1:  # what the wrapper gives for an image without objects
            assert [len(target[key]) for key in KEYS - {"image_id"}] == [0] * 5
            continue
        for key in ("boxes", "masks", "labels", "area", "iscrowd"):
            torch.testing.assert_close(target[key], torch.as_tensor(expected[key]).to(target[key].dtype))
        for key, kind, dtype in (
            ("boxes", tv_tensors.BoundingBoxes, torch.float32),
            ("masks", tv_tensors.Mask, torch.uint8),
        ):
            assert (type(target[key]), target[key].dtype) == (kind, dtype)


def test_objects_that_teach_wrong_masks_are_left_out_unless_asked_for(scenes: Dataset) -> None:
    instances = [i for sample in samples_of(Path(scenes.root.path))["val"].values() for i in sample.instances]
    for unmasked, groups in product((False, True), repeat=2):
        dataset = scenes.to_torchvision("val", keep_unmasked=unmasked, keep_groups=groups)
        expected = [i for i in instances if (unmasked or i.segmentation) and (groups or not i.is_group_of)]
        assert sum(len(dataset[row][1]["labels"]) for row in range(3)) == len(expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_processes_read_from_s3(method: str, scenes: Dataset, s3: Any, bucket: str) -> None:
    s3.upload(Path(scenes.root.path), bucket)
    remote, local = open_dataset(f"s3://{bucket}").to_torchvision("train"), scenes.to_torchvision("train")
    first = remote[0]  # this process has connections when it forks
    assert first[1]["image_id"] == 1
    loader = DataLoader(remote, 3, num_workers=2, collate_fn=pairs, multiprocessing_context=method)
    found = [pair for batch in loader for pair in batch]
    assert [target["image_id"] for _, target in found] == list(range(1, 9))
    for row, (image, target) in enumerate(found):
        expected_image, expected = local[row]
        assert (np.asarray(image) == np.asarray(expected_image)).all()
        torch.testing.assert_close(target["masks"], expected["masks"])


def test_torchvisions_mask_rcnn_trains_on_it_as_the_guide_shows(
    scenes: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = partial(maskrcnn_resnet50_fpn, weights=None, weights_backbone=None, min_size=64, max_size=64)
    monkeypatch.setattr("torchvision.models.detection.maskrcnn_resnet50_fpn", small)
    monkeypatch.setattr(maskstream, "open_dataset", lambda _: scenes)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    assert run_examples("exporting.md", names) == 1
    assert len(names["images"]) == 2
    assert set(names["losses"]) >= {"loss_classifier", "loss_box_reg", "loss_mask"}
    assert all(torch.isfinite(loss) for loss in names["losses"].values())
    assert names["losses"]["loss_mask"] > 0


def test_opening_a_dataset_does_not_import_torch(scenes: Dataset) -> None:
    code = (
        f"import sys; from shards.format.dataset import open_dataset; open_dataset({str(scenes.root)!r}).index('val')"
    )
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)
