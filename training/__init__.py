"""Data, training loop and recipes: writes runs/, then exports/."""
