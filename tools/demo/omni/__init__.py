"""The omni demo model: clips in which one digit is seen and one is heard, its training, evaluation and shipping."""
