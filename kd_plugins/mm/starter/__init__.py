"""Complete, commented configs for one's own data: ``kd-plugins init``, and ``train --model ... --data ...``."""
