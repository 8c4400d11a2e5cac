"""Changes to traced graphs, one pass per file, and the table of published recipes they carry out.

``methods/`` holds the words recipes are written in: scores, selectors and merges as plain PyTorch
functions.
"""
