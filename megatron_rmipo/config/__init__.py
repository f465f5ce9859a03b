"""The configuration of a run: its fields, and how flags and YAML files become them."""
