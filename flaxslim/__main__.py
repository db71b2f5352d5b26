"""`python -m flaxslim`."""

import sys

from flaxslim.cli import main

sys.exit(main())
