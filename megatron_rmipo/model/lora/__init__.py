"""Low-rank adapters beside frozen weights of Megatron's linear layers: what they compute, how they are cut, switched and kept."""
