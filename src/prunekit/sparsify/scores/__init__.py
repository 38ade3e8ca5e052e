"""One file a criterion. Each holds one function decorated with `prunekit.parts.score`; nothing else needs to know of it."""
