"""Changed and hostile inputs: nothing may hang, crash, end in a traceback, or be taken for the original.

    python benchmarks/fuzz.py                                      # 5000 inputs of each kind
    python benchmarks/fuzz.py --kinds samples --inputs 50000 --seed 7
    python benchmarks/fuzz.py --kinds images --only 4242           # one input again, with its traceback

- `samples`: of a shard, changed with and without the right checksum, read, collated, evaluated and drawn;
- `checkpoints`: with changed files, or a state.json of other values, loaded as training resumes; starting weights;
- `images`: of all formats that `predict` opens;
- `tables`: index, dataset.json and accounts of a dataset, COCO's instances, Ultralytics' labels, PNG masks with their
  table, a class hierarchy, CSV tables, YAML.

An input is determined by kind, seed and number. Child processes try them, each within a time limit and limited memory,
so that a crash or a hang costs one input. What a checksum covers must be refused or be equal to the original; other
changed inputs may be accepted. Prints a Markdown table; exits with 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import multiprocessing
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.building import machine
from benchmarks.fuzz_kinds import KINDS, Unnoticed
from shards.common.errors import UserError

TIMEOUT_S = 20.0  # of one input, on a busy machine
MEMORY = 16 * 2**30  # bytes of address space, of which torch maps several GB
OUTCOMES = ("refused", "accepted", "unnoticed", "traceback", "crash", "hang")
FAULTS = OUTCOMES[2:]


class Kind(Protocol):
    """A kind of inputs: made in an empty folder, then tried one by one."""

    def __init__(self, folder: Path) -> None: ...

    def check(self, rng: np.random.Generator) -> None:
        """Try one input; UserError if it is refused, `Unnoticed` if it is taken for the original and is not."""


def outcome_of(kind: Kind, name: str, seed: int, number: int) -> tuple[str, str]:
    """Try one input in this process; return its outcome, one of OUTCOMES, and why if that is a fault."""
    rng = np.random.default_rng([seed, sorted(KINDS).index(name) if name in KINDS else 0, number])
    try:
        kind.check(rng)
    except UserError as error:
        text = str(error)
        is_line = len(text.splitlines()) == 1 and len(text) < 2000  # commands escape what is not printable
        return ("refused", "") if is_line else ("traceback", f"not one line: {text!r}")
    except Unnoticed as error:
        return "unnoticed", str(error)
    except Exception:  # any: what a command does not expect ends it in this traceback, which is a fault and printed
        return "traceback", traceback.format_exc()
    return "accepted", ""


def try_all(kind: type[Kind], name: str, seed: int, numbers: Sequence[int]) -> Iterator[tuple[int, str, str]]:
    """Try inputs in child processes; yield number, outcome and why of each, in order."""
    context, left = multiprocessing.get_context("fork"), list(numbers)
    while left:
        pipe, other_end = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(other_end, kind, name, seed, left), daemon=True)
        child.start()
        other_end.close()
        try:
            if not pipe.poll(10 * TIMEOUT_S):
                raise RuntimeError(f"the inputs of {name} are not made after {10 * TIMEOUT_S:g} s")
            pipe.recv()
            while left:
                if not pipe.poll(TIMEOUT_S):
                    yield left.pop(0), "hang", f"more than {TIMEOUT_S:g} s"
                    break
                outcome, why = pipe.recv()
                yield left.pop(0), outcome, why
        except EOFError:
            child.join()
            yield left.pop(0), "crash", f"exit code {child.exitcode}"
        finally:
            child.kill()
            child.join()
            pipe.close()


def _child(pipe: Any, kind: type[Kind], name: str, seed: int, numbers: Sequence[int]) -> None:
    faulthandler.disable()  # of a test's parent: its report of a crash is long
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="maskstream-fuzz-") as folder:
        made = kind(Path(folder))
        pipe.send("ready")
        for number in numbers:
            pipe.send(outcome_of(made, name, seed, number))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=sorted(KINDS))
    parser.add_argument("--inputs", type=int, default=5000, help="number of inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of the one input to try")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    options = parser.parse_args(arguments)
    numbers = range(options.inputs) if options.only is None else [options.only]
    counts: dict[str, Counter[str]] = {}
    if not options.json:
        print(f"{len(numbers)} inputs of each kind, seed {options.seed}; {machine()}\n")
        print(f"| kind | {' | '.join(OUTCOMES)} | minutes |\n| --- |{' ---: |' * (len(OUTCOMES) + 1)}", flush=True)
    for name in options.kinds:
        began, counts[name] = time.monotonic(), Counter()
        for number, outcome, why in try_all(KINDS[name], name, options.seed, numbers):
            counts[name][outcome] += 1
            if outcome in FAULTS:
                print(
                    f"{name} {number} (--kinds {name} --only {number}): {outcome}: {why}", file=sys.stderr, flush=True
                )
        if not options.json:
            cells = " | ".join(str(counts[name][outcome]) for outcome in OUTCOMES)
            print(f"| {name} | {cells} | {(time.monotonic() - began) / 60:.1f} |", flush=True)
    if options.json:
        print(json.dumps(counts))
    return int(any(found[outcome] for found in counts.values() for outcome in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
