"""Programs that measure the project itself."""
