"""The model as prunekit sees it: its blocks and linears (anatomy) and one block in memory at a time (stream)."""
