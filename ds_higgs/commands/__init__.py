"""One module a user command."""
