"""torchvision's Mask R-CNN: building, losses, freezing, weights, checkpoints, inference.

Its `state_dict` is torchvision's.
"""
