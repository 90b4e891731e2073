"""The layouts that records come in, and the turns and images that each of them stands for."""
