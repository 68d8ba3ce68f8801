"""Backbones: one architecture a file. Each returns the feature map of every tapped stage."""
