"""The vocabulary of pruning methods: scores, selectors and merges as plain tensor functions.

``score.py`` says how much a token matters, ``select.py`` picks exactly k of them, ``merge.py`` says what becomes
of the rest. A parameter named like a signal receives that signal (``passes/signal_table.py``), ``score``, ``k``
and ``selection`` receive the result of the step before, and every other parameter is an option of a recipe.

Every function has static shapes, is deterministic, computes in float32 and treats its G groups independently.
"""
