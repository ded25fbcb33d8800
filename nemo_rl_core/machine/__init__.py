"""This machine and this process: clock, deadlines, threads, devices, files that processes share."""
