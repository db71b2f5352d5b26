"""`python -m flaxslim`."""

import sys

from flaxslim.cli import entry

sys.exit(entry())
