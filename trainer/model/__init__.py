"""torchvision's Mask R-CNN: building, losses, freezing, starting weights, checkpoints and inference.

The network is torchvision's own class, so its `state_dict` loads into stock torchvision.
"""
