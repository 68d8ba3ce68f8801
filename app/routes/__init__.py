"""One family of routes a module."""
