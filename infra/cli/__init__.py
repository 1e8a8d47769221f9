"""The `ganymede` command: one module a group of commands, nothing heavy imported before a command needs it."""
