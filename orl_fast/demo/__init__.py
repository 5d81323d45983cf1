"""The whole method in minutes: scenes drawn on the spot, packed, BYOL, mined, ORL, and a fair check at the end."""
