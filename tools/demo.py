"""Does distillation help? Every framework on real handwritten digits: ``python tools/demo.py --help``."""

import sys

from kd_plugins.cli import main

if __name__ == '__main__':
    main(['demo', *sys.argv[1:]])
