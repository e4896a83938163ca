"""`python -m experiments.isoflop`."""

import sys

from experiments.isoflop.run import main
from mod_star.errors import InputError

if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
