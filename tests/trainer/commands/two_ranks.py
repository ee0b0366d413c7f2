"""All that two ranks do together and end normally: `python two_ranks.py FOLDER`.

The second rank is forked when everything is imported: starting a launcher and two ranks would take longer than what
they do, and other tests launch them. Each rank leaves `rank-N.json` with what it saw, next to the folders of the runs;
`test_two_ranks.py` looks at them.
"""

import gc
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from torch.distributed import distributed_c10d

from shards.common.errors import StorageError
from shards.storage.location import Location, check_writable
from tests.trainer import tiny
from tests.trainer.run.test_prepared import check_prepared_loaders
from trainer.commands import evaluate, fill, predict, train
from trainer.run import distributed
from trainer.run.run_state import begin_stage

FOLDER = Path(sys.argv[1])
PORT = str(tiny.free_port())
SECOND = os.fork()  # its process id, or 0 in itself
RANK = 0 if SECOND else 1
os.environ |= {"RANK": str(RANK), "LOCAL_RANK": str(RANK), "WORLD_SIZE": "2"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}
# Every part of a run's state at once.
EVERYTHING = tiny.STAGES | {
    "train__accumulate": 2,
    "train__ema": 0.9,
    "loss__unmasked": "masks",  # the average teaches
    "loss__affinity_warmup": 1,
    "train__checkpoint_steps": 2,
    "train__keep_checkpoints": 9,
    "optim__optimizer": "adamw",
    "optim__decay_norms": "false",
    "optim__schedule": "cosine",
    "optim__warmup_steps": 1,
    "data__photometric": 0.5,
}
REPLACED: dict[str, Any] = {"train__steps_per_epoch": 3, "data__val_split": "", "data__skip_bad": 2}


class Crash(BaseException):
    """Ends a training between two steps, as a power cut does: nothing is saved."""


def digest(network: torch.nn.Module) -> str:
    """Hash of the weights; statistics of batch norms differ between ranks until they are saved."""
    found = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if "running" not in name and "num_batches" not in name:
            found.update(name.encode() + value.cpu().numpy().tobytes())
    return found.hexdigest()


def run(name: str, **changes: Any) -> dict[str, str]:
    """Train; returns a hash of this rank's weights at the beginning of each new stage and at the end."""
    digests = {}

    def beginning(t: Any) -> None:
        digests[str(t.step)] = digest(t.network)
        begin_stage(t)

    with mock.patch.object(train, "begin_stage", beginning):
        network = train.train(train.parse(tiny.arguments(FOLDER / "data", FOLDER / name, **changes)))
    return digests | {"end": digest(network)}


def stopped_and_crashed() -> tuple[int, dict[str, str]]:
    """The run with everything, interrupted in both stages; the status of the first part, and the hashes of the last."""
    settings = EVERYTHING | {"data__workers": 1}
    monkeypatch = pytest.MonkeyPatch()
    if RANK == 1:
        tiny.before_step(monkeypatch, 3, tiny.send_sigterm)
    status = train.main(tiny.arguments(FOLDER / "data", FOLDER / "broken", **settings))
    tiny.before_step(monkeypatch, 6, mock.Mock(side_effect=Crash))
    with pytest.raises(Crash):
        run("broken", **settings)
    return status, run("broken", **EVERYTHING)


def writable() -> str:
    """The error of a folder that the main rank cannot write to."""
    accelerator = distributed.start_accelerator()
    only_main = check_writable if RANK == 0 else None  # the others must not try
    with mock.patch.object(distributed, "check_writable", only_main):
        distributed.main_can_write(Location(f"{FOLDER}/new"), "--out", accelerator)
        with pytest.raises(StorageError) as caught:
            distributed.main_can_write(Location(f"{FOLDER}/file"), "--out", accelerator)
    return str(caught.value)


def predict_twice(accelerator: Accelerator) -> None:
    """Predict on a split, and again after some of the parts are lost."""
    words = tiny.predict_options(FOLDER / "unbroken", FOLDER / "data")
    options = predict.parse([*words, "--out", f"{FOLDER}/predicted"])
    predict.predict(options)
    if RANK == 0:
        for part in sorted((FOLDER / "predicted").glob("parts/*/*"))[1::3]:
            part.unlink()
    accelerator.wait_for_everyone()
    predict.predict(options)


def main() -> None:
    gc.freeze()  # as in the fixture of the other trainings
    Accelerator.end_training = lambda self: None  # it would end the group of processes
    mock.patch("trainer.run.runlog.draw_curves", return_value=b"").start()  # slower than the training
    mock.patch("trainer.step.box_terms.SURE", 0.5).start()  # which the average is not, after few steps
    accelerator = distributed.start_accelerator(timeout=distributed.TRAINING_TIMEOUT)
    group = distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    facts: dict[str, Any] = {"timeout_s": group.options._timeout.total_seconds()}
    facts["write_error"] = writable()
    check_prepared_loaders(accelerator, FOLDER / "data")
    facts["unbroken"] = run("unbroken", **EVERYTHING)
    facts["status"], facts["broken"] = stopped_and_crashed()
    facts["sgd"] = run("sgd", **tiny.SHORT_STAGES)
    run("replaced", **REPLACED, data__shards=FOLDER / "damaged")
    words = ["--checkpoint", str(FOLDER / "unbroken"), "--data.workers", "0", "--batch-size", "1", "--pictures", "3"]
    evaluate.evaluate_checkpoint(evaluate.parse([*words, "--out", str(FOLDER / "evaluation")]))
    predict_twice(accelerator)
    fill.fill(fill.parse(tiny.fill_options(FOLDER / "masks", FOLDER / "data", FOLDER / "filled")))
    (FOLDER / f"rank-{RANK}.json").write_text(json.dumps(facts))
    if SECOND:
        os.waitpid(SECOND, 0)


if __name__ == "__main__":
    main()
