"""Entry point of `python -m hf_flashcp`, which does the same as the console script `flashcp`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
