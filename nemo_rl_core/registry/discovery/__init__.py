"""Discovery of installed components from package metadata; imports no plugin."""
