"""What a report says: best trials, tests, costs, the papers' figures."""
