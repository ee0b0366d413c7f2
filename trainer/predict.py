"""Find objects in images; see `trainer/commands/predict.py`."""

import sys
from pathlib import Path

# Run the checkout that this script is in, also where another copy is installed.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.commands.predict import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
