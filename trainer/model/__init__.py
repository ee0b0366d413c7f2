"""torchvision's Mask R-CNN: building, losses, weights, inference. Its `state_dict` loads into stock torchvision."""
