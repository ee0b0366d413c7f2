"""Sources of images and annotations: Open Images and COCO files. A source is a class that implements `base.Source`."""
