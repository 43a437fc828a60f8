"""``python -m tbn_compiler.cli``."""

import sys

from tbn_compiler.cli import main

sys.exit(main())
