"""MicroVMs whose root disk is an attached snapshot."""
