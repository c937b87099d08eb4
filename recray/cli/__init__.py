"""The command line: one file a verb, each parsing its options and calling one function of `recray.api`."""
