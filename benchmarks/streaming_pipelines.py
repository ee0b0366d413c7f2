"""torchvision's reference pipeline, the limit of the machine, and the conversion into the peers' formats.

For `benchmarks/streaming.py`.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.streaming_loaders import Job, Raw

CHUNK_BYTES = 64 * 2**20  # of the peers' own formats, the default of both


class ReferencePipeline:
    """torchvision's reference for detection: PIL, a full-size mask per object, transforms v2, lists of tensors.

    https://github.com/pytorch/vision/blob/main/references/detection/presets.py (`hflip`, backend `pil`, `use_v2`), and
    its resizing, which GeneralizedRCNNTransform does in the model, is done in the worker. Images stay uint8, to the
    advantage of the peers: the reference sends float32, four times the bytes.
    """

    def __init__(self, min_size: int, max_size: int) -> None:
        from torchvision.transforms import v2

        self.transforms = v2.Compose(
            [
                v2.RandomHorizontalFlip(0.5),
                v2.RandomShortestSize(min_size=[min_size], max_size=max_size),
                v2.PILToTensor(),
                v2.ConvertBoundingBoxFormat("XYXY"),
                v2.SanitizeBoundingBoxes(),
                v2.ToPureTensor(),
            ]
        )

    def __call__(self, samples: Sequence[Raw]) -> list[Any]:
        return [(key, *self._prepare(image, text)) for key, image, text in samples]

    def _prepare(self, data: bytes, text: bytes) -> tuple[Any, dict[str, Any]]:
        import numpy as np
        import torch
        from PIL import Image
        from pycocotools import mask as coco_mask
        from torchvision import tv_tensors

        image = Image.open(io.BytesIO(data)).convert("RGB")
        value = json.loads(text)
        size = (value["height"], value["width"])
        annotations = value["annotations"]
        # An object without a mask gets an empty one: the reference requires a mask.
        masks = np.zeros((len(annotations), *size), np.uint8)
        for mask, annotation in zip(masks, annotations):
            if annotation["segmentation"] is not None:
                mask[:] = coco_mask.decode(annotation["segmentation"])
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4),
                format="XYWH",
                canvas_size=size,
            ),
            "labels": torch.tensor([a["category_id"] for a in annotations]),
            "masks": tv_tensors.Mask(torch.from_numpy(masks)),
            "iscrowd": torch.tensor([a["iscrowd"] for a in annotations]),
        }
        return self.transforms(image, target)  # type: ignore[no-any-return]


def limit(job: Job) -> dict[str, float]:
    """Measure decoding and resizing of JPEGs in memory, in `workers` processes, as `TrainCollate` does it.

    `pillow_rate` and `pillow_cpu_ms` are those with Pillow's decoder, which the peers' pipeline uses.
    """
    import torch.multiprocessing as mp

    from shards.format.dataset import open_dataset
    from shards.stream.streams import EvalStream

    batches = EvalStream(open_dataset(job.root), "train", batch_size=job.samples)
    images: list[bytes] = [sample.image for sample in next(iter(batches))]
    context = mp.get_context("fork")
    return {**_limit_of(job, images, context, ""), **_limit_of(job, images, context, "pillow_")}


def _limit_of(job: Job, images: list[bytes], context: Any, decoder: str) -> dict[str, float]:
    barrier, times = context.Barrier(job.workers), context.SimpleQueue()
    shares = [images[number :: job.workers] for number in range(job.workers)]
    processes = [context.Process(target=_decode_all, args=(job, share, barrier, times, decoder)) for share in shares]
    for process in processes:
        process.start()
    begins, ends, spent = zip(*(times.get() for _ in processes))
    for process in processes:
        process.join()
    rate, cpu_ms = len(images) / (max(ends) - min(begins)), 1000 * sum(spent) / len(images)
    return {f"{decoder}rate": rate, f"{decoder}cpu_ms": cpu_ms}


def _decode_all(job: Job, images: list[bytes], barrier: Any, times: Any, decoder: str) -> None:
    import numpy as np
    import torch
    from PIL import Image
    from torchvision.transforms.v2 import functional as transforms

    from trainer.data.augment import scaled_size
    from trainer.data.collate import decode_image

    def by_pillow(data: bytes) -> Any:
        with Image.open(io.BytesIO(data)) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

    decode = by_pillow if decoder else decode_image
    torch.set_num_threads(1)
    decode(images[0])
    barrier.wait()
    begin, spent = time.perf_counter(), time.process_time()
    for data in images:
        image = decode(data)
        height, width = image.shape[-2:]
        size = scaled_size(height, width, job.min_size, job.max_size)
        transforms.resize(image, list(size), antialias=False)
    times.put((begin, time.perf_counter(), time.process_time() - spent))


def convert(job: Job) -> dict[str, int]:
    """Convert the tars in `root` to the peers' formats, in `scratch`: same keys, same bytes. Return bytes of each."""
    out = Path(job.scratch)
    tars = sorted(Path(job.root).glob("*.tar"))
    _to_mds(_members(tars), out / "mds")
    _to_parquet(tars, out / "parquet")
    _to_litdata(tars, out / "litdata")
    return {path.name: sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) for path in sorted(out.iterdir())}


def _members(tars: Iterable[Path]) -> Iterator[dict[str, Any]]:
    import tarfile

    for path in tars:
        with tarfile.open(path) as tar:
            sample: dict[str, Any] = {}
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                key, _, extension = member.name.partition(".")
                sample |= {"key": key, extension: file.read()}
                if extension == "json":
                    yield sample
                    sample = {}


def _to_mds(samples: Iterable[dict[str, Any]], out: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(out), columns={"key": "str", "jpg": "bytes", "json": "bytes"}) as writer:
        for sample in samples:
            writer.write(sample)


def _to_parquet(tars: list[Path], out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out.mkdir()
    for path in tars:
        # Row groups of 100 rows, as `datasets` writes them for images. A dictionary would store repeated JPEGs once.
        table = pa.Table.from_pylist(list(_members([path])))
        pq.write_table(
            table, out / f"{path.stem}.parquet", compression="none", use_dictionary=False, row_group_size=100
        )


def _one(path: str) -> Iterator[dict[str, Any]]:
    yield from _members([Path(path)])


def _to_litdata(tars: list[Path], out: Path) -> None:
    from litdata import optimize

    optimize(_one, [str(path) for path in tars], str(out), chunk_bytes=CHUNK_BYTES, num_workers=1, verbose=False)
