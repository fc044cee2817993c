"""Pure bytes to values and back: no I/O, no network, no clock."""
