#!/usr/bin/env bash
# Install this project into the Python of NVIDIA's PyTorch image, whose own packages stay as they are: what the Dockerfile and the
# Apptainer definition run, from the root of the project.
set -euo pipefail

# What NVIDIA built for the image. Its own constraints (PIP_CONSTRAINT) pin more than that, some of it older than what is needed here.
KEPT=$(mktemp)
python - >"$KEPT" <<'PYTHON'
import importlib.metadata, sys
kept = "torch torchvision torchao triton pytorch-triton numpy transformer-engine transformer-engine-torch flash-attn apex".split()
found = {name: dist.version for dist in importlib.metadata.distributions() for name in [dist.metadata["Name"].lower().replace("_", "-")]}
version = found.get("torch", "none")
if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < (2, 11):
    sys.exit(f"torch 2.11 or later is needed, and this image has {version}: take a newer one")
print("\n".join(f"{name}=={found[name]}" for name in kept if name in found))
PYTHON
export PIP_CONSTRAINT=$KEPT PIP_NO_CACHE_DIR=1
pip install --requirement containers/requirements.txt
pip install --no-deps --no-build-isolation --editable .
python -m megatron_rmipo.entry
rm "$KEPT"
