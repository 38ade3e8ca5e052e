"""Training a pruned model with low-rank adapters: options, adapters that keep zeros, the loss, the steps."""
