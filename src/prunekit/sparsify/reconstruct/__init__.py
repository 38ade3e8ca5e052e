"""One file a reconstruction. Each holds a function decorated with `prunekit.parts.reconstruct`; nothing else needs to know of it."""
