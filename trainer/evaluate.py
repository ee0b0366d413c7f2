"""Evaluate a checkpoint on a split of a shard dataset; see `trainer/commands/evaluate.py`."""

import sys
from pathlib import Path

# Import the packages next to this script's folder, even if another copy is installed. The folder itself, which python
# puts first (not with -P), must not be importable: `import data` would find trainer/data.
folder = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == folder:
    del sys.path[0]
if sys.path[:1] != [str(folder.parent)]:
    sys.path.insert(0, str(folder.parent))

from trainer.commands.evaluate import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
