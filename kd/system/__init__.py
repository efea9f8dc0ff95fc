"""Files, processes, signals, consoles and remote storage: services that any program needs."""
