"""What is done to data: samples, teacher, student, evaluation."""
