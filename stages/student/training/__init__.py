"""Training one stage of a student."""
