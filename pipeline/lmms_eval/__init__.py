"""The plug-in of lmms-eval, which loads it; nothing else here imports that package."""
