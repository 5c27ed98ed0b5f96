"""Training: `accelerate launch -m train --config train/recipes/<name>.yaml`."""
