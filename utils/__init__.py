"""What training, evaluation, data tools and deployment share."""
