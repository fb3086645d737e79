"""What runs notebooks, publishes what they leave, and says how it went."""
