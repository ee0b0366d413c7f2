"""`python -m maskstream` is the command `maskstream`."""

import sys

from maskstream.cli import main

if __name__ == "__main__":
    sys.exit(main())
