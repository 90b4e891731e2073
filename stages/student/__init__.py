"""Students: their model, what they are trained on, the losses and the training loop."""
