"""The bundled example and the demo that runs the whole pipeline on it."""
