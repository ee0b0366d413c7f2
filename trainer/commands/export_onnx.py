"""The command `maskstream export --to onnx`: the network of a run, for onnxruntime."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from shards.commands.command_line import Parser, run, say
from shards.commands.options import add_options, from_arguments
from shards.common.errors import UserError
from shards.common.text import printable
from shards.storage.location import Location
from trainer.config.command_options import OnnxOptions

EPILOG = """\
The file contains everything from image to detections, resizing included, with the checkpoint's score threshold, NMS and
number of detections:

  input    image   uint8 [3, height, width], RGB, of any size, one at a time
  outputs  boxes   float32 [N, 4], left, top, right, bottom in pixels of the image
           labels  int64 [N], ids of the classes
           scores  float32 [N], descending
           masks   bool [N, height, width]
  metadata classes     JSON: the name of each id
           maskstream  JSON: classes, settings of the network, and its input size

examples:
  maskstream export runs/traffic/best --to onnx --out traffic.onnx
  maskstream export s3://bucket/runs/traffic --to onnx --out s3://bucket/traffic.onnx

It needs `pip install '.[onnx]'`. See docs/exporting.md."""

EXAMPLE = """\
import numpy, onnxruntime, PIL.Image

session = onnxruntime.InferenceSession({!r})
image = numpy.asarray(PIL.Image.open("street.jpg").convert("RGB")).transpose(2, 0, 1)
boxes, labels, scores, masks = session.run(None, {{"image": image}})"""


def main(arguments: Sequence[str] | None, program: str = "maskstream export") -> int:
    """Run the command and return its exit status."""
    parser = Parser(
        program,
        "Write the network of a run as an ONNX file, with the detections of torchvision's network.",
        epilog=EPILOG,
        usage=f"{program} CHECKPOINT --to onnx --out FILE",
    )
    add_options(parser, OnnxOptions)
    return run("export", lambda: _export(from_arguments(OnnxOptions, parser.parse_args(arguments))), show=printable)


def _export(options: OnnxOptions) -> int:
    out = Location(options.out)
    if out.exists():
        raise UserError(f"--out {out}: it exists already: delete it, or give another name")
    try:
        import onnx  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("onnx is not installed: pip install '.[onnx]'") from error

    from trainer.model.checkpoint import open_checkpoint
    from trainer.model.onnx_file import onnx_file

    state = open_checkpoint(options.checkpoint)
    data = onnx_file(state)
    out.write(data)
    file = str(out) if out.is_local else posixpath.basename(out.path)  # onnxruntime opens no URLs
    say(f"{out}: {len(data) / 1e6:.1f} MB, step {state.step} of {options.checkpoint}\n\n{EXAMPLE.format(file)}")
    return 0
