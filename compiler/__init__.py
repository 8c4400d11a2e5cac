"""From a checkpoint directory to pruned programs.

``recipe`` and ``geometry`` say what the user asked for, ``trace`` turns a Hugging Face model into graphs
with one attention node per layer, ``program`` and ``token_map`` are what the passes work on, and
``pipeline`` lists every step from top to bottom. ``families/`` holds the facts about each model family.
"""
