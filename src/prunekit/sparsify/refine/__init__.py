"""One file a refinement. Each holds a function decorated with `prunekit.parts.refine`; nothing else needs to know of it."""
