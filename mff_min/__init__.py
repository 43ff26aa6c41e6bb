"""The core of mff_min: a ViT, masked image modelling on top of it, and what the stages share."""
