"""Score kernels, written once in Triton: one kernel per file, each with the launch it is made for.

``table.py`` lists them as plugins, ``lowering.py`` puts their nodes into graphs, ``aot.py`` compiles them without a
GPU, ``register.py`` hands them to TensorRT, ``run.py`` runs them on tensors. Only the kernels' own files and ``aot.py``
import triton, which is an extra (``kernels``) and heavy: nothing imports those unless kernels are wanted.
"""
