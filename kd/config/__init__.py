"""Options: the config groups and their components, rules between them, checks of the command line."""
