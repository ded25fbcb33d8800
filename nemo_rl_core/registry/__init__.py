"""Names to components: index, decorators, resolution, manifest."""
