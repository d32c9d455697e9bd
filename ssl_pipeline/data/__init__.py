"""From files to batches of augmented views. DALI is imported here and nowhere else."""
