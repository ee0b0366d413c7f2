"""The training step of Mask R-CNN for a whole batch at once, in fixed shapes.

From a padded batch and torchvision's network to the five losses, by small functions on batched tensors. No function
reads a value of a GPU, except the one that `trainable` names.
"""
