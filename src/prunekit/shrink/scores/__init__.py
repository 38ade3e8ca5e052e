"""One file a criterion. Each holds functions decorated with `prunekit.parts.unit_score`; nothing else needs to know of them."""
