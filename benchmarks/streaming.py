"""Streaming of training data, compared with webdataset, mosaicml-streaming, LitData and Hugging Face `datasets`.

    python -m venv peers && peers/bin/pip install torch torchvision pycocotools webdataset mosaicml-streaming litdata \
        datasets s3fs torchdata
    python benchmarks/streaming.py --peers peers/bin/python --json results.json

All read the same samples (real photographs if `--photographs` has them, drawn scenes otherwise, repeated under new
keys), from a real S3 server (SeaweedFS) on loopback, with and without a proxy that adds latency to every request, and
from the local disk. Every measurement runs in its own process; the table has the medians of `--repeats`, the JSON every
value. Server and proxy share the machine with what is measured, equally for all.

- raw: samples per second as bytes, after the first batch, over one epoch, nothing decoded, nothing cached before.
- first batch: from the end of the imports to the first batch, with empty caches.
- resume: the same in the middle of an epoch, from the state that the loader saved there in another process.
- memory and disk: the largest sum of proportional set sizes (PSS) of the processes over a raw epoch, and what remains
  on disk after it. Measured in runs that are not timed.
- CPU: processor time per sample of all processes of the loader, without the server.
- training batches: decoded and resized, by `TrainCollate` or by torchvision's reference pipeline for the peers.
- the limit: decoding and resizing the same JPEGs from memory, on the same number of processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.bucket import make_bucket
from benchmarks.requirements import require
from benchmarks.streaming_loaders import LOADERS, Job
from demo.s3server import S3Server

ROOT = Path(__file__).parents[1]
OURS = "maskstream"
FORMATS = {  # the folder of each loader's data
    OURS: "shards",
    "webdataset": "shards/train",
    "mosaicml-streaming": "mds",
    "litdata": "litdata",
    "datasets, tars": "shards/train",
    "datasets, parquet": "parquet",
}
MODULES = {  # what each loader imports
    OURS: set[str](),
    "webdataset": {"webdataset"},
    "mosaicml-streaming": {"streaming"},
    "litdata": {"litdata"},
    "datasets, tars": {"datasets", "torchdata"},
    "datasets, parquet": {"datasets", "torchdata"},
}
PACKAGES = ("torch", "torchvision", "webdataset", "mosaicml-streaming", "litdata", "datasets", "torchdata", "pillow")
BUCKET = "streaming"


@dataclass(frozen=True)
class Source:
    """A place to read from: its name in the table, the root of all formats, and the environment variables for it."""

    name: str
    root: str
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Figures:
    """The measurements of one loader at one source: a list per measure, one value per repeat."""

    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)

    def median(self, name: str) -> float | None:
        return statistics.median(self.values[name]) if self.values.get(name) else None


Table = dict[tuple[str, str], Figures]  # by loader and source


def main() -> int:
    """Measure and print."""
    options = parse_arguments()
    require(["weed"])
    require(modules=sorted(set().union(*(MODULES[name] for name in options.loaders))), python=options.peers)
    with tempfile.TemporaryDirectory(prefix="streaming-") as name, S3Server() as server:
        folder = Path(name)
        data = options.data or folder / "data"
        what, sizes = prepare(data, folder, options)
        away, table = f"s3://{BUCKET}", Table()
        places = {"disk": Source("local disk", str(data))}
        with proxy(server.endpoint_url, options.latency) as slow:
            if set(options.sources) - {"disk"}:
                server.make_bucket(BUCKET)
                server.upload(data, BUCKET)
                places["s3"] = Source("S3", away, pointed(server.environment()))
                late = f"S3 + {1000 * options.latency:g} ms"
                places["late"] = Source(late, away, pointed({**server.environment(), **slow}))
            for repeat in range(options.repeats):
                for source in (places[source] for source in options.sources):
                    for loader in options.loaders:
                        figures = table.setdefault((loader, source.name), Figures())
                        measure(figures, loader, source, options, folder, first=repeat == 0)
            limits = [decoding_limit(data, folder, options) for _ in range(options.repeats)]
    results = {
        "machine": machine(),
        "data": what,
        "bytes": sizes,
        "versions": versions(options.peers),
        "options": {key: str(value) for key, value in vars(options).items()},
        "limit": limits,
        "figures": {
            f"{loader} | {source}": {"values": figures.values, "notes": figures.notes}
            for (loader, source), figures in table.items()
        },
    }
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    print(render(results, table, options))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", default=sys.executable, help="the Python that has the peers [this one]")
    parser.add_argument("--photographs", type=Path, help="a small mirror of Open Images [../shared/openimages-sample]")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--long-side", type=int, help="enlarge or reduce the pictures to it, in pixels")
    parser.add_argument("--decoded", type=int, default=768, help="samples of a measurement of training batches [768]")
    parser.add_argument("--latency", type=float, default=0.03, help="seconds that the proxy adds to a request [0.03]")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of a loader [2]")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--loaders", nargs="*", default=list(FORMATS), choices=list(FORMATS), metavar="NAME")
    parser.add_argument("--sources", nargs="*", default=["disk", "s3", "late"], choices=["disk", "s3", "late"])
    parser.add_argument("--data", type=Path, help="keep the prepared data there, and take it from there the next time")
    parser.add_argument("--quick", action="store_true", help="512 samples, one repeat: does it run at all")
    parser.add_argument("--json", type=Path, help="write every single value there")
    options = parser.parse_args()
    if options.quick:
        options.samples, options.decoded, options.repeats = 512, 128, 1
    return options


def prepare(data: Path, folder: Path, options: argparse.Namespace) -> tuple[str, dict[str, int]]:
    """Build the shards and convert them; returns the pictures in words and the bytes of each format."""
    done, shards = data / "prepared.json", data / "shards"
    if not done.exists():
        with make_bucket(options.samples, options.photographs, options.long_side) as bucket:
            sources = ["--images", str(bucket.images), "--annotations", str(bucket.annotations)]
            quotas = ["--per-class", str(options.samples), "--eval-per-class", "0", "--no-cache"]
            command = [sys.executable, "-m", "builder.commands.cli", *quotas, *sources, "--out", str(shards)]
            subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            mean = bucket.image_bytes / 1e6 / options.samples
            what = f"{options.samples} samples, {bucket.what}, {mean:.3f} MB per JPEG"
        tars = sorted((shards / "train").glob("*.tar"))
        job = Job("convert", str(shards / "train"), scratch=str(data))
        sizes = {"shards": sum(path.stat().st_size for path in tars), **run(options.peers, job, folder, {})[0]}
        done.write_text(json.dumps([what, sizes, len(tars)]))
    what, sizes, count = json.loads(done.read_text())
    os.environ["SHARDS"] = str(count)
    return what, sizes


def measure(
    figures: Figures, loader: str, source: Source, options: argparse.Namespace, folder: Path, *, first: bool
) -> None:
    """Measure everything once for one loader and source."""
    python = sys.executable if loader == OURS else options.peers
    root = f"{source.root}/{FORMATS[loader]}"
    whole = options.samples // options.batch_size * options.batch_size - options.batch_size * options.workers
    common: dict[str, Any] = {"root": root, "batch_size": options.batch_size, "workers": options.workers}

    def once(**changes: Any) -> Any:
        return run(python, Job(loader, **common, **changes), folder, source.environment)[0]

    def note(text: str) -> None:
        figures.notes.append(text)
        print(f"streaming: {loader}, {source.name}: {text}", file=sys.stderr)

    try:
        result = once(samples=whole)
        figures.values["import_s"].append(result["start_s"])
        figures.values["first_s"].append(result["first_s"])
        figures.values["raw"].append(result["rate"])
        figures.values["raw_cpu_ms"].append(result["cpu_ms"])
        if first:
            _, memory, disk = run(python, Job(loader, **common, samples=whole), folder, source.environment, watch=True)
            figures.values["memory"].append(memory)
            figures.values["disk"].append(disk)
        state = folder / f"state-{loader}-{source.name}".replace(" ", "-")
        half = whole // 2 // options.batch_size * options.batch_size
        if first:
            saved = once(samples=half, save=str(state))
            (folder / f"{state.name}.keys").write_text(json.dumps(saved["keys"]))
        resumed = once(samples=0, resume=str(state))
        figures.values["resume_s"].append(resumed["first_s"])
        if resumed["keys"] != json.loads((folder / f"{state.name}.keys").read_text()):
            note("resumes with another batch than the one that followed")
        if source.name != "S3":  # between the two others
            result = once(samples=options.decoded, decode=True)
            figures.values["decoded"].append(result["rate"])
            figures.values["decoded_cpu_ms"].append(result["cpu_ms"])
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = (getattr(error, "stderr", "") or "").strip().splitlines()
        note(f"{type(error).__name__}: {said[-1] if said else error}")


def decoding_limit(data: Path, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return samples per second (`rate`) and processor time (`cpu_ms`) of decoding and resizing alone."""
    job = Job("limit", str(data / "shards"), samples=options.decoded, workers=options.workers)
    return dict(run(sys.executable, job, folder, {})[0])


def run(
    python: str, job: Job, folder: Path, environment: dict[str, str], *, watch: bool = False
) -> tuple[Any, float, int]:
    """Run a measurement in its own process, with empty folders.

    Returns:
        its result, the peak memory of its processes in bytes (0 without `watch`), and the bytes that it left on disk.

    Raises:
        subprocess.CalledProcessError: it failed.
        subprocess.TimeoutExpired: it took too long.
    """
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "cache").mkdir(parents=True)
    homes = {name: str(scratch) for name in ("TMPDIR", "HOME", "HF_HOME", "XDG_CACHE_HOME")}
    job = Job(**{**asdict(job), "scratch": job.scratch or str(scratch / "cache"), "started": time.time()})
    # As a module: with this folder first on the path, `streaming` would be this file and not mosaicml's package.
    command = [python, "-m", "benchmarks.streaming_loaders", json.dumps(asdict(job))]
    with (folder / "said").open("w+") as said:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment, **homes},
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,
        )
        peak, deadline = 0.0, time.monotonic() + 120
        try:
            while watch and process.poll() is None and time.monotonic() < deadline:
                peak = max(peak, group_memory(process.pid))
                time.sleep(0.05)
            out, _ = process.communicate(timeout=max(1, deadline - time.monotonic()))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode:
            said.seek(0)
            raise subprocess.CalledProcessError(process.returncode, command, stderr=said.read())
    disk = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file() and not path.is_symlink())
    return json.loads(out.strip().splitlines()[-1]), peak, disk


def pointed(environment: dict[str, str]) -> dict[str, str]:
    """Add the variable that mosaicml-streaming needs."""
    return {**environment, "S3_ENDPOINT_URL": environment["AWS_ENDPOINT_URL"]}


def group_memory(group: int) -> float:
    """Return the PSS of the processes of a session, in bytes."""
    total = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[3]) == group:
                    found = re.search(r"^Pss:\s+(\d+)", (entry / "smaps_rollup").read_text(), re.MULTILINE)
                    total += int(found[1]) * 1024 if found else 0
    return float(total)


@contextlib.contextmanager
def proxy(upstream: str, latency: float) -> Iterator[dict[str, str]]:
    """Run the proxy in its own process; yield the environment variables for it."""
    command = [sys.executable, "-m", "demo.s3proxy", "--upstream", upstream, "--latency", str(latency)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        variables = {}
        for line in process.stdout:
            if line.startswith("#"):
                break
            name, _, value = line.removeprefix("export ").strip().partition("=")
            variables[name] = value
        try:
            yield variables
        finally:
            process.terminate()


def render(results: dict[str, Any], table: Table, options: argparse.Namespace) -> str:
    """Markdown."""
    limit, limit_cpu, pillow, pillow_cpu = (
        statistics.median(one[name] for one in results["limit"])
        for name in ("rate", "cpu_ms", "pillow_rate", "pillow_cpu_ms")
    )
    lines = [
        f"{results['machine']}; {results['data']}; {options.workers} workers, batches of {options.batch_size}, medians "
        f"of {options.repeats}. " + ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        "",
        f"The limit of decoding and resizing on {options.workers} processes: {limit:.0f} samples/s, "
        f"{limit_cpu:.2f} ms of processor time per sample; with Pillow's decoder {pillow:.0f} samples/s, "
        f"{pillow_cpu:.2f} ms.",
    ]
    for source in dict.fromkeys(source for _, source in table):
        lines += [
            "",
            f"### {source}",
            "",
            "| | raw, samples/s | CPU, ms | training batches, samples/s | of the limit | CPU, ms | first batch, s "
            "| resume, s | memory, MiB | disk, MB | imports, s |",
            "| --- " + "| ---: " * 10 + "|",
        ]
        for loader in options.loaders:
            of = table[loader, source].median
            decoded = of("decoded")
            cells = [
                shown(of("raw"), 0),
                shown(of("raw_cpu_ms"), 2),
                shown(decoded, 0),
                shown(decoded and decoded / limit, 2),
                shown(of("decoded_cpu_ms"), 2),
                shown(of("first_s"), 2),
                shown(of("resume_s"), 2),
                shown(of("memory"), 0, 2**-20),
                shown(of("disk"), 0, 1e-6),
                shown(of("import_s"), 1),
            ]
            lines.append(f"| {loader} | {' | '.join(cells)} |")
        notes = {f"{loader}: {text}" for loader in options.loaders for text in table[loader, source].notes}
        lines += ["", *(f"- {text}" for text in sorted(notes))] if notes else []
    return "\n".join(lines)


def shown(value: float | None, digits: int, factor: float = 1) -> str:
    return "-" if value is None else f"{value * factor:,.{digits}f}"


def versions(python: str) -> dict[str, str]:
    """Return the versions of the packages of the peers' Python."""
    code = (
        "import json, sys; from importlib import metadata as m\n"
        "def v(n):\n try: return m.version(n)\n except m.PackageNotFoundError: return '-'\n"
        "print(json.dumps({n: v(n) for n in sys.argv[1:]}))"
    )
    done = subprocess.run([python, "-c", code, *PACKAGES], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def machine() -> str:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{os.cpu_count()} cores of {names[0] if names else 'an unnamed processor'}"


assert set(FORMATS) == set(LOADERS)

if __name__ == "__main__":
    sys.exit(main())
