"""``python -m ds_optforge``: the ``ds-optforge`` command."""

import sys

from ds_optforge.cli import main

if __name__ == "__main__":
    sys.exit(main())
