"""`python -m nemo_rl_core.cli`."""

import sys

from nemo_rl_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
