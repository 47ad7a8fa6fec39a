"""The router: one HTTP front, links to all nodes, placement, joining and recovery of streams. No torch."""
