"""Where workers run and how weights move: resources, the local launcher, fingerprints, weight sync.

Import from the modules; nothing here imports torch.
"""
