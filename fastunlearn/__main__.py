"""`python -m fastunlearn` is the command line `fastunlearn`."""

import sys

from fastunlearn.cli import main

sys.exit(main())
