"""What the three BDD100K scripts share. See README.md for the map of modules."""
