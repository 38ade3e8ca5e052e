"""A Hugging Face folder, tensor by tensor: find it, read it lazily, write it a shard per block, say what was done."""
