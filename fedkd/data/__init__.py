"""Data sets, partitions and canaries."""
