"""Write the embedded data set, scenes of real handwritten digits: ``python tools/prepare_digits.py --help``."""

import sys

from kd_plugins.cli import main

if __name__ == '__main__':
    main(['prepare-digits', *sys.argv[1:]])
