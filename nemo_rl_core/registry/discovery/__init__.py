"""What is installed, as package metadata tells it; nothing of a plugin is imported."""
