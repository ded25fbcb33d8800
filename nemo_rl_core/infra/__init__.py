"""Infrastructure of a run: worker processes, engines, and the transfer of weights.

Import from the modules; nothing here imports torch.
"""
