"""Model families, a file each: how its Hugging Face config and its tensor names translate."""
