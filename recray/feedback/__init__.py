"""What users did after they were answered: kept for the next answer, logged for the next training."""
