"""Policy-gradient losses, one file each; `base` holds what they share."""
