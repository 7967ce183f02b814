"""``python -m kd_plugins``, the ``kd-plugins`` command; also for ``torchrun -m kd_plugins train ...``."""

from kd_plugins.cli import main

if __name__ == '__main__':
    main()
