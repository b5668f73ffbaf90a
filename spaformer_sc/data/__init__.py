"""From AnnData to fields of view: labels, graphs, tiles, counts and held-out parts."""
