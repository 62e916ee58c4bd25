"""`python -m refine_verl`: lists the commands; `python -m refine_verl NAME ...` runs one."""

import sys

from refine_verl.command.front import main

if __name__ == "__main__":
    sys.exit(main())
