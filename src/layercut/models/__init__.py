"""Models: from a name to files, to a model in memory, to its decoder layers run one by one."""
