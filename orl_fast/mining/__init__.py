"""Stage 2 of ORL: neighbors, object proposals, RoIs and the pairs of corresponding RoIs."""
