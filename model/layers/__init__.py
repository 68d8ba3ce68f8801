"""Attention between layers, one paper a file. Each layer returns its output and the attention it used."""
