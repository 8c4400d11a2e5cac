"""Opens a bundle and runs it: manifest, sessions, KV caches, sampling, and one backend per file.

Nothing here imports torch, onnx, or any other folder of Secateur.
"""
