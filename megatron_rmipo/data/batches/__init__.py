"""Global batches: which pairs, how they are cut over ranks into packs, and how a pack is laid out."""
