"""Weight syncs between processes: shared memory and CUDA IPC, collective broadcast, sparse deltas, disk."""
