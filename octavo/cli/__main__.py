"""`python -m octavo.cli`: the command `octavo` without its script."""

import sys

from octavo.cli import main

if __name__ == "__main__":
    sys.exit(main())
