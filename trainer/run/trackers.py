"""accelerate's experiment trackers: the names of their runs, what resumes, and pictures."""

from __future__ import annotations

import io
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from shards.storage.location import Location

if TYPE_CHECKING:
    from accelerate import Accelerator

PROJECT = "maskstream"
WANDB_FILE = "wandb.txt"  # id of the run of Weights & Biases
SIDE = 1000  # pixels, the longer side of a picture


def start_trackers(accelerator: Accelerator, run: Location, config: Mapping[str, Any], names: list[str]) -> None:
    """Start the trackers of a run on the main rank; one of Weights & Biases has the folder's name, and resumes."""
    options = {"wandb": wandb_options(run)} if "wandb" in names else {}
    accelerator.init_trackers(PROJECT, config=dict(config), init_kwargs=options)


def wandb_options(run: Location) -> dict[str, str]:
    """Return the arguments of `wandb.init`, with the id that the run's folder keeps."""
    file = run / WANDB_FILE
    if not file.exists():
        file.write(secrets.token_hex(4).encode())
    return {"name": run.path.rstrip("/").rpartition("/")[2], "id": file.read().decode().strip(), "resume": "allow"}


def log_pictures(accelerator: Accelerator, pictures: Mapping[str, bytes], step: int) -> None:
    """Log encoded pictures by their names to TensorBoard and Weights & Biases, as far as these are in use."""
    trackers = [tracker for tracker in accelerator.trackers if tracker.name in ("tensorboard", "wandb")]
    for name, data in pictures.items() if trackers else ():
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        picture.thumbnail((SIDE, SIDE))
        for tracker in trackers:
            if tracker.name == "wandb":
                tracker.log_images({name: [picture]}, step=step)
            else:
                tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")  # [1, H, W, 3]
