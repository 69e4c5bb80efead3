"""Third-party models and trainers with our layers in them."""
