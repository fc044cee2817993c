"""The node's processes: supervisor, block server, control daemon, and mounting with them."""
