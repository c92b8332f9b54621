"""`python -m layercut.cli`, as torchrun and accelerate launch start it."""

import sys

from layercut.cli.command_line import main

if __name__ == "__main__":
    sys.exit(main())
