"""What pruning costs and what it buys, measured: accuracy against keep ratio, and time against FLOPs."""
