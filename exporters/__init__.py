"""From pruned graphs to files a backend loads: ONNX per dialect, its linter, weights, TensorRT engines."""
