"""How a student is made: its shape, the teacher layers it starts from, its projections."""
