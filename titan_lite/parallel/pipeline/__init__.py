"""Pipeline parallelism: ranks hold different layers, and micro-batches go from one to the next."""
