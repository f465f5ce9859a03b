"""Memory of a rank: what a layout needs, and what to say when it ran out."""
