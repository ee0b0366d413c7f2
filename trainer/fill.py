"""Predict masks for objects that have a box only; see `trainer/commands/fill.py`."""

import sys
from pathlib import Path

# Import this checkout even if another copy is installed, and never trainer/data as `data`.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "trainer"))]

from trainer.commands.fill import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
