"""Who signed a snapshot's manifest, and whether a policy accepts that (docs/trust.md)."""
