"""Copying and summing strided rows of one kind of memory: one interface, a file for each kind."""
