"""``python -m lola`` is the ``lola`` command."""

import sys

from lola.cli import main

if __name__ == "__main__":
    sys.exit(main())
