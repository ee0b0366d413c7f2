# %% [markdown]
# # Look into shards
#
# From a dataset on any storage to pictures. Each `# %%` starts a cell in VS Code, PyCharm, Spyder and Jupytext. It also
# runs as a script, without a display, and writes its pictures to a folder:
#
#     SHARDS=s3://bucket/traffic OUT=look python examples/look_into_shards.py

# %%
import os
from pathlib import Path

import numpy as np

from shards.drawing.overlay import display_instances, display_top_masks, draw_instances, legible_scale
from shards.format.dataset import open_dataset
from shards.inspect.preview_samples import choose, find, read_samples
from shards.inspect.statistics import count, totals

ROOT = os.environ.get("SHARDS", "s3://bucket/traffic")
OUT = Path(os.environ.get("OUT", "look"))
OUT.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# Opening a dataset reads two small files, `dataset.json` and `index.parquet`, from which the classes are counted.

# %%
dataset = open_dataset(ROOT)
classes = totals(count(dataset))
print(classes[classes["images"] > 0].to_string(index=False))

# %% [markdown]
# Range requests fetch eight samples of different classes and splits, and no other part of the shards. Masks are filled,
# boxes without a mask are dashed, group-of regions are hatched.

# %%
samples = [sample for _, sample in read_samples(dataset, choose(dataset, 8))]
for sample in samples:
    scale = legible_scale(sample.width, sample.height)
    picture = draw_instances(sample.picture(), sample.instances, dataset.categories, scale=scale)
    picture.save(OUT / f"{sample.image_id}.png")

# %% [markdown]
# One image by its id, as the arrays of matterport's Mask_RCNN: masks `[H, W, N]`, boxes `[N, 4]` y1, x1, y2, x2, and
# class ids, which index the class names, the first of which is the background.

# %%
most = max(samples, key=lambda one: sum(instance.segmentation is not None for instance in one.instances))
[(_, sample)] = read_samples(dataset, [find(dataset, most.image_id)])
masked = [number for number, instance in enumerate(sample.instances) if instance.segmentation is not None]
instances = [sample.instances[number] for number in masked]

image = np.asarray(sample.picture())
masks = sample.masks()[masked].transpose(1, 2, 0)
boxes = np.array([(y, x, y + h, x + w) for x, y, w, h in (instance.bbox for instance in instances)])
class_ids = np.array([instance.category_id for instance in instances])
class_names = ["BG"] * (max(category.id for category in dataset.categories) + 1)
for category in dataset.categories:
    class_names[category.id] = category.name
print(sample.image_id, image.shape, masks.shape, boxes.shape, class_ids.shape)

# %%
shown = display_instances(image, boxes, masks, class_ids, class_names, title=sample.image_id)
shown.save(OUT / "instances.png")

# %%
panes = display_top_masks(image, masks, class_ids, class_names)
panes.save(OUT / "top_masks.png")
