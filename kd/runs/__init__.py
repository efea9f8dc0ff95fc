"""One run: its name, folder, state, provenance, loggers and exported student."""
