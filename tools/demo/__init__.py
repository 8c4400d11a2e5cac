"""The demo model: scenes of handwritten digits, its training, evaluation and shipping."""
