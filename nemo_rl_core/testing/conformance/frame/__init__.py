"""What every kit is made of: clauses, subjects, what a component declares."""
