"""One file a way to tune a pruned block as a whole. Each holds a function decorated with `prunekit.parts.tune`."""
