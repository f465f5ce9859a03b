"""Parts of a layer that Megatron-Core does not have, or not as the models need them."""
