"""A small synthetic world: drawn scenes, what can be said about them, and the data set made of both."""
