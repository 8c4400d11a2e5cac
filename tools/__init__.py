"""The command line, one verb per file, and the demo, benchmark and parity programs."""
