"""`tidegate demo`: the story of one model on real data, told with figures that are checked as they are printed."""
