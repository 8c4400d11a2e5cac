"""`secateur sweep`: recipes times keep ratios, asked questions whose answers are known.

``verb`` is the command, ``data`` reads the questions, ``engine`` walks the cells, ``answers`` asks one bundle,
``frontier`` and ``page`` show what was found; ``bundles`` and ``records`` serve the other benchmarks too.
"""

from secateur.tools.sweep.verb import sweep

__all__ = ["sweep"]
