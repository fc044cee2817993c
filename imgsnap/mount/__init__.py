"""Making a snapshot visible: mount(2), overlay, mount records, running a command."""
