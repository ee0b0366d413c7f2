"""Sources of images and annotations, one class each: Open Images, COCO, LVIS, PNG masks, Ultralytics."""
