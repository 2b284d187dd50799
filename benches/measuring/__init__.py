"""What the benchmarks share: counters of the kernel, spreads and tables, and a description of the machine."""
