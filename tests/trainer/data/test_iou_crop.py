"""The random crop by IoU, against torchvision's."""

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import RandomIoUCrop

from shards.format.sample import Instance
from trainer.data.instances import GROUP_OF, IGNORED, read_instances
from trainer.data.iou_crop import Window, crop, draw_window


class TorchDraws:
    """The part of numpy's generator that the crop uses, with the random numbers of torch's generator."""

    def integers(self, low: int, high: int) -> int:
        return int(torch.randint(low=low, high=high, size=(1,)))

    def random(self, count: int) -> np.ndarray:
        return torch.rand(count).numpy()


def test_draw_window_is_torchvisions_for_the_same_random_numbers() -> None:
    windows = set()
    rng = np.random.default_rng(0)
    for seed in range(60):
        height, width = rng.integers(100, 400, 2).tolist()
        corner = rng.uniform(0, (width, height), (4, 2))
        boxes = np.concatenate((corner, np.minimum(corner + rng.uniform(20, 300, (4, 2)), (width, height))), axis=1)
        tensors = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))  # type: ignore[call-overload]
        torch.manual_seed(seed)
        expected = RandomIoUCrop().make_params([tensors])
        torch.manual_seed(seed)
        found = draw_window(height, width, boxes, TorchDraws())  # type: ignore[arg-type]
        names = ("left", "top", "width", "height")
        assert found == (tuple(expected[name] for name in names) if expected else (0, 0, width, height))
        windows.add(found)
    assert len(windows) > 40


def test_an_image_without_objects_is_not_cropped() -> None:
    assert draw_window(50, 60, np.zeros((0, 4)), np.random.default_rng(0)) == (0, 0, 60, 50)


def test_crop_ignores_objects_with_their_centre_outside_and_clips_regions() -> None:
    boxes = [(20, 20, 20, 20), (45, 10, 20, 20), (70, 70, 20, 20)]
    annotations = [*(Instance(1 + i, box, None) for i, box in enumerate(boxes))]
    annotations.append(Instance(4, (0, 0, 100, 100), None, is_group_of=True))
    image = torch.arange(100 * 100).view(1, 100, 100).expand(3, -1, -1)
    pixels, found = crop(image, read_instances(annotations), Window(10, 0, 40, 60))
    assert torch.equal(pixels, image[:, :60, 10:50])
    assert found.labels.tolist() == [1, 2, 4]
    assert found.flags.tolist() == [0, IGNORED, GROUP_OF]
    assert found.boxes.tolist() == [[10, 20, 30, 40], [35, 10, 40, 30], [0, 0, 40, 60]]
