"""One mask for all classes, in checkpoints that torchvision loads."""

import copy

import torch

from tests.trainer.batches import FEW, narrow
from trainer.config.settings import DataConfig
from trainer.model.build import build_model
from trainer.model.shared_mask import SharedMask

DATA = DataConfig(min_size=96, max_size=96)


def test_a_checkpoint_loads_strictly_into_torchvisions_network_with_the_same_detections() -> None:
    torch.manual_seed(0)
    own = build_model(narrow(mask_head="agnostic", **FEW), DATA, 5).eval()
    stock = build_model(narrow(**FEW), DATA, 5).eval()
    last = own.roi_heads.mask_predictor.mask_fcn_logits
    assert isinstance(last, SharedMask)
    assert [len(value) for value in last.parameters()] == [1, 1]
    stock.load_state_dict(own.state_dict(), strict=True)
    image = torch.rand((3, 80, 96), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        [found], [expected] = own([image]), stock([image])
    assert len(found["masks"]) > 0
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6), name

    again = build_model(narrow(mask_head="agnostic", **FEW), DATA, 5).eval()
    again.load_state_dict(stock.state_dict(), strict=True)
    averaged = copy.deepcopy(again)  # as the moving average of the weights
    for network in (again, averaged):
        assert torch.equal(network.roi_heads.mask_predictor.mask_fcn_logits.weight, last.weight)
        assert all(torch.equal(value, own.state_dict()[name]) for name, value in network.state_dict().items())


def test_masks_of_several_classes_are_averaged_without_the_background() -> None:
    layer, rows = SharedMask(2, 3), torch.tensor([[9.0, 9], [1, 2], [3, 4]])
    layer.load_state_dict({"weight": rows[:, :, None, None], "bias": torch.tensor([7.0, 1, 2])})
    assert [value.flatten().tolist() for value in layer.parameters()] == [[2, 3], [1.5]]
