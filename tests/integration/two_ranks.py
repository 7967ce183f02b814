"""Train configs one after another in the processes of one group: ``torchrun two_ranks.py CONFIG...``.

To start takes longer than the runs do.
"""

import sys

from kd_plugins.mm import cli

if __name__ == '__main__':
    for config in sys.argv[1:]:
        cli.train([config, '--launcher', 'pytorch'])
