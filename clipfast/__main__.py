"""`python -m clipfast`: the command line."""

import sys

from clipfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
