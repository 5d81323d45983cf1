"""The whole method in minutes: synthetic scenes, packed, BYOL, mined, ORL, and a fair check at the end."""
