"""Options: the config groups and their components, rules between them, what a command line may say."""
