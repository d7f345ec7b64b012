"""Programs that a launcher starts on several ranks."""
