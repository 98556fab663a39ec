"""What training reads: records and folders, their order, reading ahead, local copies."""
